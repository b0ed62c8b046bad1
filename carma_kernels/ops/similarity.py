"""The pairwise similarity operator: one launch for the norms and one for the matrix, two for the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from carma_kernels import _runtime
from carma_kernels._autograd import Operation
from carma_kernels._operators import (
    SIMILARITY_SCHEMA,
    SimilarityArguments,
    empty_gradients,
    layer_views,
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
    OnDevice,
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
    T, D = arguments.hidden[0].shape[-2:]
    if T * D > _INT32_MAX:
        raise ValueError(
            f"hidden_states have sequences of {T} tokens with {D} numbers each; the triton backend takes sequences of "
            "up to 2^31 - 1 numbers. Use backend='torch'."
        )
    (matrix,) = _operation(_Problem(*arguments))
    return matrix


class _Problem(SimilarityArguments):
    """What the operators were asked."""

    __slots__ = ()

    @property
    def layers(self) -> tuple[Tensor, ...]:
        """Those of the range, `[B, T, D]` each."""
        return layer_views(self.hidden)[slice(*self.range)]


def _forward(problem: _Problem) -> tuple[Tensor, Tensor]:
    """The matrix, and the inverse norms `[L, B, T]`."""
    matrix, inverse_norm = _empty_results(problem)
    if matrix.numel():
        with on_device(matrix.device):
            launches = _Launches(problem, inverse_norm)
            if problem.cosine:
                launches.norms()
            launches.forward(launches.inverse_temperature, matrix)
    return matrix, inverse_norm


def _empty_results(problem: _Problem) -> tuple[Tensor, Tensor]:
    layer = problem.layers[0]
    L = len(problem.layers)
    B, T, _ = layer.shape
    inverse_norm_shape = (L, B, T) if problem.cosine else (0,)
    return (
        layer.new_empty((L, B, T, T), dtype=problem.out_dtype),
        layer.new_empty(inverse_norm_shape, dtype=torch.float32),
    )


def _backward(
    problem: _Problem,
    upstream: tuple[Tensor | None, ...],
    kept: list[Tensor],
    needs_grad: list[bool],
    needs_work: bool,
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the hidden states that need one, and, if asked for, `-tau` times that of the temperature."""
    (grad,) = upstream
    assert grad is not None
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
        launches = _Launches(problem, inverse_norm, LayerTable(out) if has_destination else None)
        grad = grad.contiguous()
        scale = launches.inverse_temperature
        projection = launches.projection(grad) if problem.cosine or needs_work else None
        if has_destination:
            launches.backward(scale, grad, projection)
        if needs_work and projection is not None:  # sum of G s = half of sum_i r_i c_i / tau
            projection = projection.sum(2)  # [L, B, T]
            if problem.cosine:
                projection = projection * inverse_norm
            work = projection.sum() * scale * 0.5
    return gradients, work


def _empty_backward(problem: _Problem, needs_grad: list[bool]) -> tuple[list[Tensor], Tensor]:
    hidden = problem.hidden
    return empty_gradients(hidden, needs_grad), hidden[0].new_zeros((), dtype=torch.float32)


_operation = Operation(
    "triton_pairwise_similarity",
    "pairwise_similarity",
    SIMILARITY_SCHEMA,
    _Problem,
    forward=_forward,
    empty=_empty_results,
    num_results=2,
    num_outputs=1,
    kept=(1,),
    backward=_backward,
    empty_backward=_empty_backward,
)


class _Launches:
    """The launches over one problem's layers."""

    def __init__(self, problem: _Problem, inverse_norm: Tensor, out: LayerTable | None = None) -> None:
        """Take a problem, its inverse norms, which `norms` writes and the others read, and where gradients go."""
        (value,), self._hidden, self._out = OnDevice.of(
            (1.0 / problem.temperature_value,), readable(problem.layers), out
        )
        self.inverse_temperature = inverse_temperature(problem.temperature, value)
        self._inverse_norm = inverse_norm
        self._mask = problem.mask.contiguous().view(torch.uint8) if problem.mask is not None else None
        self._cosine = problem.cosine
        self._grid = (len(self._hidden), *self._hidden.shape)  # L, B, T, D

    def norms(self) -> None:
        L, B, T, D = self._grid
        options = self._configuration("similarity_norms")
        _runtime.launch(
            _similarity_norms_kernel,
            (ceil_div(T, options["BLOCK_T"]) * B * L,),
            self._hidden.addresses,
            self._mask,
            self._inverse_norm,
            B,
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
            (ceil_div(T, options["BLOCK_T"]) ** 2 * B * L,),
            self._hidden.addresses,
            self._mask,
            self._inverse_norm,
            scale,
            matrix,
            B,
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
            (num_blocks**2 * B * L,),
            self._hidden.addresses,
            self._mask,
            self._inverse_norm,
            grad,
            projection,
            B,
            T,
            D,
            PRECISION=dot_precision(self._hidden.present.dtype),
            **self._flags,
            **constants(self._hidden),
            **options,
        )
        return projection

    def backward(self, scale: Tensor, grad: Tensor, projection: Tensor | None) -> None:
        assert self._out is not None
        L, B, T, D = self._grid
        options = self._configuration("similarity_backward")
        dtype = self._hidden.present.dtype
        pieces = ceil_div(T, options["BLOCK_T"]) * ceil_div(D, options["BLOCK_D"])
        _runtime.launch(
            _similarity_backward_kernel,
            (pieces * B * L,),
            self._hidden.addresses,
            self._out.addresses,
            self._mask,
            self._inverse_norm,
            scale,
            grad,
            projection,
            B,
            T,
            D,
            projection.shape[2] if projection is not None else 0,
            PRECISION="tf32" if dtype == torch.float16 else dot_precision(dtype),
            **self._flags,
            **constants(self._hidden, self._out),
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
