"""How far a backend is from the reference on a problem, and how far it may be.

An error of a value is the largest difference from the reference's, over the reference's largest entry. So is that of a
gradient, layer by layer, but for what it is held against: see `_gradient_sizes`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import carma_kernels
from carma_kernels._terms import ZERO_NORM
from carma_kernels.doctor.findings import one_line
from carma_kernels.verify.problems import Problem

TOLERANCE = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-5, 1e-5),
    # computed in fp32, so the value is as good as there; the gradient is rounded to the dtype, which costs eps / 2
    torch.bfloat16: (1e-5, torch.finfo(torch.bfloat16).eps),
    torch.float16: (1e-5, torch.finfo(torch.float16).eps),
}
"""What an error may be: of the value, of the gradients"""


class Outcome(NamedTuple):
    """How far a backend is from the reference on one problem."""

    problem: Problem
    value_error: float
    gradient_error: float
    excess: float
    """the larger error over its tolerance: a miss above 1"""
    failure: str
    """the exception, if it raised one"""


def compare(reference: Any, problem: Problem, dtype: torch.dtype, device: torch.device, backend: str) -> Outcome:
    """A backend with the reference; what the backend raises is an error without bounds."""
    values, gradients = _evaluate(reference, problem, torch.float64, torch.device("cpu"))
    sizes = _gradient_sizes(reference, problem, gradients)
    try:
        got_values, got_gradients = _evaluate(carma_kernels, problem, dtype, device, backend=backend)
    except Exception as error:
        return Outcome(problem, math.inf, math.inf, math.inf, f"{type(error).__name__}: {one_line(error)}")
    errors = _error(got_values, values, values), _error(got_gradients, gradients, sizes)
    excess = max(error / allowed for error, allowed in zip(errors, TOLERANCE[dtype], strict=True))
    return Outcome(problem, *errors, excess, "")


def _evaluate(
    package: Any, problem: Problem, dtype: torch.dtype, device: torch.device, **backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a random combination of them with respect to each layer and the temperature."""
    leaves = [layer.detach().to(device, dtype).requires_grad_() for layer in problem.hidden]
    hidden = leaves[0] if leaves[0].dim() == 4 else list(leaves)
    temperature = problem.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
        leaves.append(temperature)
    mask = None if problem.mask is None else problem.mask.to(device)
    outputs = _outputs(package, problem, hidden, temperature, mask, backend)

    generator = torch.Generator().manual_seed(problem.seed)
    total = size = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=device)
    for output in outputs:
        upstream = torch.rand(output.shape, generator=generator, dtype=torch.float64) + 0.5
        if output.requires_grad:
            weighted = output * upstream.to(output)
            total = total + weighted.sum()
            size = size + weighted.detach().abs().sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    gradients = [
        torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, found, strict=True)
    ]
    if isinstance(temperature, Tensor):
        # its terms can cancel, and so can similarities: held against the sum of the outputs' sizes, over tau
        gradients[-1] = torch.stack([gradients[-1], size / temperature.detach()])
    if problem.hidden[0].dim() == 4:
        gradients[:1] = gradients[0].unbind(0)  # each layer is held against its own size
    return [output.detach() for output in outputs], gradients


def _outputs(
    package: Any,
    problem: Problem,
    hidden: Tensor | list[Tensor],
    temperature: float | Tensor,
    mask: Tensor | None,
    backend: dict[str, str],
) -> list[Tensor]:
    function = getattr(package, problem.check.function)
    device = hidden[0].device
    if problem.check.function == "pairwise_similarity":
        options = problem.options
        if package is not carma_kernels:
            options = {**options, "out_dtype": torch.float64}
        return [function(hidden, temperature=temperature, mask=mask, **options, **backend)]
    if problem.check.function == "stability_loss":
        return [function(hidden, mask=mask, **problem.options, **backend)]
    pairs = problem.pairs.to(device)
    if problem.check.function == "mi_loss":
        return [function(hidden, pairs, temperature=temperature, **problem.options, **backend)]
    config = package.CarmaConfig(temperature=temperature, **problem.options)
    *losses, num_pairs = function(hidden, pairs, config, mask=mask, **backend)
    return [*losses, torch.tensor(float(num_pairs))]


def _gradient_sizes(reference: Any, problem: Problem, gradients: list[Tensor]) -> list[Tensor]:
    """What an error of each gradient is held against: of a hidden state's, the mean of it and of its terms' sizes.

    A gradient is a sum over the tokens that h_i is compared with, `sum_j dL/ds_ij ds_ij/dh_i`. An operand of that
    product, rounded to the dtype, moves it by as much as its terms are large, however far they cancel; rounding the
    result moves it by as much as it is itself. Two roundings of eps / 2 each, of these two, are eps of their mean.
    """
    sizes = [gradient.abs() for gradient in gradients]
    if problem.check.metric != "-":
        for layer, terms in enumerate(_term_sizes(reference, problem)):
            sizes[layer] = (sizes[layer] + torch.maximum(sizes[layer], terms)) / 2
    return sizes


def _term_sizes(reference: Any, problem: Problem) -> Tensor:
    """`sum_j |dL/ds_ij ds_ij/dh_i|` of each hidden state, `[L, B, T, D]` fp64.

    The reference gives dL/ds: let every token have one more coordinate for each token, 1 in its own and 0 in the
    others. The products of different tokens are what they were, and token i's gradient in the coordinate of token j is
    `dL/ds_ij / tau`.
    """
    hidden = problem.hidden[0] if problem.hidden[0].dim() == 4 else torch.stack(problem.hidden)
    h = hidden.double().nan_to_num()  # [L, B, T, D]: what is not a number is padding
    L, B, T, D = h.shape
    N = B * T
    scale = torch.ones(L, B, T, 1, dtype=h.dtype)
    if problem.check.metric == "cosine":
        norm = h.norm(dim=-1, keepdim=True)
        scale = torch.where(norm > ZERO_NORM, 1 / norm, 0.0)
    v = h * scale  # s_ij = v_i . v_j / tau
    own = torch.eye(N, dtype=h.dtype).view(B, T, N).expand(L, B, T, N)
    compared = replace(
        problem,
        hidden=(torch.cat([v, own], -1),),
        temperature=float(problem.temperature),
        options={**problem.options, "metric": "dot"},
    )
    _, gradients = _evaluate(reference, compared, torch.float64, torch.device("cpu"))
    sizes = []
    for v_, gradient in zip(v.flatten(1, 2), gradients, strict=True):  # [N, D], [B, T, D + N]
        by_score = gradient[..., D:].reshape(N, N).abs()  # |dL/ds_ij| / tau
        along = v_.expand(N, N, D)  # of token i and j, what moves s_ij: v_j, for the cosine less its part along v_i
        if problem.check.metric == "cosine":
            along = along - (v_ @ v_.T)[:, :, None] * v_[:, None]
        sizes.append(torch.einsum("ij,ijd->id", by_score, along.abs()).view(B, T, D))
    return torch.stack(sizes) * scale


def _error(got: list[Tensor], want: list[Tensor], sizes: list[Tensor]) -> float:
    """The largest difference over the largest size, of the worst tensor; inf for NaN or another shape.

    A size below the dtype's smallest normal number counts as large as that: such numbers have fewer digits.
    """
    errors = [0.0]
    for tensor, reference, of_reference in zip(got, want, sizes, strict=True):
        if tensor.shape != reference.shape:
            return math.inf
        if reference.numel():
            size = max(float(of_reference.abs().max()), torch.finfo(tensor.dtype).smallest_normal)
            error = float((tensor.cpu().double() - reference).abs().max()) / size
            errors.append(math.inf if math.isnan(error) else error)
    return max(errors)
