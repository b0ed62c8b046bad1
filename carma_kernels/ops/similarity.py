"""The pairwise similarity operator: one launch for the norms and one for the matrix, two for the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from carma_kernels import _runtime
from carma_kernels._operators import (
    SIMILARITY_SCHEMA,
    SimilarityArguments,
    empty_gradients,
    layer_views,
    register_gradient,
    similarity_arguments,
)
from carma_kernels._terms import Similarity
from carma_kernels.kernels import launch
from carma_kernels.kernels.similarity import (
    _similarity_backward_kernel,
    _similarity_forward_kernel,
    _similarity_norms_kernel,
    _similarity_projection_kernel,
)
from carma_kernels.ops.layers import (
    LayerTable,
    ceil_div,
    check_dtype,
    constants,
    destinations,
    dot_precision,
    inverse_temperature,
    on_device,
    readable,
    target,
)

_INT32_MAX = 2**31 - 1  # what the kernels can number of a sequence


def pairwise_similarity(
    hidden: Tensor | Sequence[Tensor],
    layers: range,
    similarity: Similarity,
    mask: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`[len(layers), B, T, T]` in `out_dtype`: see `carma_kernels.pairwise_similarity`."""
    arguments = similarity_arguments(hidden, layers, similarity, mask, out_dtype)
    check_dtype(arguments.hidden[0])
    B, T, D = arguments.hidden[0].shape[-3:]
    if B > _runtime.MOST_SEQUENCES:
        raise ValueError(
            f"hidden_states have {B} sequences; the triton backend takes up to {_runtime.MOST_SEQUENCES} for a matrix. "
            "Use smaller batches, or backend='torch'."
        )
    if T * D > _INT32_MAX:
        raise ValueError(
            f"hidden_states have sequences of {T} tokens with {D} numbers each; the triton backend takes sequences of "
            "up to 2^31 - 1 numbers. Use backend='torch'."
        )
    matrix: Tensor = _forward(*arguments)[0]
    return matrix


class _Problem(SimilarityArguments):
    """What the operators were asked."""

    __slots__ = ()

    @property
    def layers(self) -> tuple[Tensor, ...]:
        """Those of the range, `[B, T, D]` each."""
        return layer_views(self.hidden)[slice(*self.range)]


@library.custom_op(
    "carma_kernels::triton_pairwise_similarity", mutates_args=(), schema=f"({SIMILARITY_SCHEMA}) -> (Tensor, Tensor)"
)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The matrix, and the inverse norms `[L, B, T]`."""
    problem = _Problem(*arguments)
    matrix, inverse_norm = _empty_results(problem)
    if matrix.numel():
        with on_device(matrix.device):
            launches = _Launches(problem, inverse_norm)
            if problem.cosine:
                launches.norms()
            launches.forward(launches.inverse_temperature, matrix)
    return matrix, inverse_norm


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(_Problem(*arguments))


def _empty_results(problem: _Problem) -> tuple[Tensor, Tensor]:
    layer = problem.layers[0]
    L = len(problem.layers)
    B, T, _ = layer.shape
    inverse_norm_shape = (L, B, T) if problem.cosine else (0,)
    return (
        layer.new_empty((L, B, T, T), dtype=problem.out_dtype),
        layer.new_empty(inverse_norm_shape, dtype=torch.float32),
    )


@library.custom_op(
    "carma_kernels::triton_pairwise_similarity_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad, Tensor[] kept, bool[] needs_grad, bool needs_work, {SIMILARITY_SCHEMA}) -> (Tensor[], Tensor)"
    ),
)
def _backward(
    grad: Tensor, kept: list[Tensor], needs_grad: list[bool], needs_work: bool, *arguments: Any
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the hidden states that need one, and, if asked for, `-tau` times that of the temperature."""
    problem = _Problem(*arguments)
    (inverse_norm,) = kept
    gradients = empty_gradients(problem.hidden, needs_grad)
    all_out = destinations(problem.hidden, gradients, needs_grad)
    chosen = slice(*problem.range)
    out = all_out.layers[chosen] if all_out is not None else ()
    if all_out is not None and len(out) < len(all_out):
        for layer in (*all_out.layers[: chosen.start], *all_out.layers[chosen.stop :]):
            if layer is not None:
                layer.zero_()
    has_destination = any(layer is not None and layer.numel() for layer in out)
    work = grad.new_zeros((), dtype=torch.float32)
    if not grad.numel() or not (has_destination or needs_work):
        return gradients, work
    with on_device(grad.device):
        launches = _Launches(problem, inverse_norm)
        grad = grad.contiguous()
        scale = launches.inverse_temperature
        projection = launches.projection(grad) if problem.cosine or needs_work else None
        if has_destination:
            launches.backward(scale, grad, projection, LayerTable(out))
        if needs_work and projection is not None:  # sum of G s = half of sum_i r_i c_i / tau
            projection = projection.sum(2)  # [L, B, T]
            if problem.cosine:
                projection = projection * inverse_norm
            work = projection.sum() * scale * 0.5
    return gradients, work


@_backward.register_fake
def _(*upstream_and_arguments: Any) -> tuple[list[Tensor], Tensor]:
    needs_grad, _, *arguments = upstream_and_arguments[2:]
    hidden = _Problem(*arguments).hidden
    return empty_gradients(hidden, needs_grad), hidden[0].new_zeros((), dtype=torch.float32)


register_gradient(_forward, _backward, SimilarityArguments, num_losses=1, function="pairwise_similarity")


class _Launches:
    """The launches over one problem's layers."""

    def __init__(self, problem: _Problem, inverse_norm: Tensor) -> None:
        """Take a problem and its inverse norms, which `norms` writes and the others read."""
        self._hidden = readable(problem.layers, 1.0 / problem.temperature_value)
        self._temperature = problem.temperature
        self._inverse_norm = inverse_norm
        self._mask = problem.mask.contiguous().view(torch.uint8) if problem.mask is not None else None
        self._cosine = problem.cosine
        self._grid = (len(self._hidden), *self._hidden.shape)  # L, B, T, D

    @property
    def inverse_temperature(self) -> Tensor:
        """`1/tau`, 0-d on the device."""
        return inverse_temperature(self._temperature, self._hidden)

    def norms(self) -> None:
        L, B, T, D = self._grid
        options = self._configuration("similarity_norms")
        _runtime.launch(
            _similarity_norms_kernel,
            (ceil_div(T, options["BLOCK_T"]), B, L),
            self._hidden.addresses,
            self._mask,
            self._inverse_norm,
            T,
            D,
            HAS_MASK=self._mask is not None,
            **constants(self._hidden),
            **options,
        )

    def forward(self, scale: Tensor, matrix: Tensor) -> None:
        L, B, T, D = self._grid
        options = self._configuration("similarity_tiles")
        _runtime.launch(
            _similarity_forward_kernel,
            (ceil_div(T, options["BLOCK_T"]) ** 2, B, L),
            self._hidden.addresses,
            self._mask,
            self._inverse_norm,
            scale,
            matrix,
            T,
            D,
            PRECISION=dot_precision(self._hidden.present.dtype),
            **self._flags,
            **constants(self._hidden),
            **options,
        )

    def projection(self, grad: Tensor) -> Tensor:
        """`[L, B, ceil(T / BLOCK_T), T]`, to be summed over the blocks."""
        L, B, T, D = self._grid
        options = self._configuration("similarity_tiles")
        num_blocks = ceil_div(T, options["BLOCK_T"])
        projection = grad.new_empty((L, B, num_blocks, T), dtype=torch.float32)
        _runtime.launch(
            _similarity_projection_kernel,
            (num_blocks**2, B, L),
            self._hidden.addresses,
            self._mask,
            self._inverse_norm,
            grad,
            projection,
            T,
            D,
            PRECISION=dot_precision(self._hidden.present.dtype),
            **self._flags,
            **constants(self._hidden),
            **options,
        )
        return projection

    def backward(self, scale: Tensor, grad: Tensor, projection: Tensor | None, out: LayerTable) -> None:
        L, B, T, D = self._grid
        options = self._configuration("similarity_backward")
        dtype = self._hidden.present.dtype
        pieces = ceil_div(T, options["BLOCK_T"]) * ceil_div(D, options["BLOCK_D"])
        _runtime.launch(
            _similarity_backward_kernel,
            (pieces, B, L),
            self._hidden.addresses,
            out.addresses,
            self._mask,
            self._inverse_norm,
            scale,
            grad,
            projection,
            T,
            D,
            projection.shape[2] if projection is not None else 0,
            PRECISION="tf32" if dtype == torch.float16 else dot_precision(dtype),
            **self._flags,
            **constants(self._hidden, out),
            **options,
        )

    @property
    def _flags(self) -> dict[str, bool]:
        return {"HAS_MASK": self._mask is not None, "COSINE": self._cosine}

    def _configuration(self, kernel: str) -> dict[str, Any]:
        layer = self._hidden.present
        configuration = launch.choose(kernel, target(layer.device), self._hidden.shape[1], layer.element_size())
        if configuration is None:
            raise AssertionError(f"no launch configuration for {kernel}")
        return configuration.options
