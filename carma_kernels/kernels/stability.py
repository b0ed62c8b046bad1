"""The stability loss: one read of the hidden states forward, one read and one write backward.

A program owns some rows (tokens) and walks through the layers with the previous one in registers. Sums over a layer are
made in two stages of fixed order: a number a program and layer, then `_finalize_kernel`.

With `energy_l = mean(h_l^2)`, `change_l = mean((h_{l+1} - h_l)^2)` over the N elements that take part,

    r_l = change_l / (energy_l + energy_{l+1} + eps)         k_l = 2 / (N (energy_l + energy_{l+1} + eps))
    d r_l / d h_l     = -k_l (h_{l+1} - h_l) - k_l r_l h_l
    d r_l / d h_{l+1} =  k_l (h_{l+1} - h_l) - k_l r_l h_{l+1}
"""

import triton
import triton.language as tl

from carma_kernels.kernels.jit import kernel
from carma_kernels.kernels.tiles import has_layer, inverse_norm, layer_pointer, load_rows, mask_if, pid64, rounded


@kernel("start", "stop", "norms_start", "norms_stop", "N")
def _stability_forward_kernel(
    hidden_table,  # [L] of [N, D]
    mask_ptr,  # [N] uint8, rows in the sums
    inverse_norms_ptr,  # [norms_stop - norms_start, N] out
    partials_ptr,  # [2 * walked + 1, programs] out: energy of each layer, change since the one before, rows in the sums
    start,  # first layer walked
    stop,  # and the one after the last
    norms_start,  # first layer whose norms are wanted
    norms_stop,  # and the one after the last
    N,
    D,
    SUMS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    INTERPRETED: tl.constexpr,  # noqa: ARG001
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of rows. Squared norms and squared changes of the rows; sums over the block, inverse norms."""
    program = pid64(0)
    programs = tl.num_programs(0)
    row = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    column = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    is_row = row < N
    takes_part = is_row
    if HAS_MASK:
        takes_part &= tl.load(mask_ptr + row, mask=is_row, other=0) != 0
    inside = is_row[:, None] & (column < D)[None, :]
    offset = row[:, None] * D + column[None, :]  # [BLOCK_ROWS, BLOCK_D]

    partial = partials_ptr + program
    changes = (stop - start).to(tl.int64) * programs
    norms = inverse_norms_ptr + (start - norms_start).to(tl.int64) * N
    before = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for layer in tl.range(start, stop):
        x = load_rows(layer_pointer(hidden_table, layer, DTYPE, ALIGNMENT), offset, inside)
        energy = tl.sum(x * x, 1)  # [BLOCK_ROWS]
        if SUMS:
            if HAS_MASK:  # replaced, not multiplied: rows that take no part may hold anything
                x = tl.where(takes_part[:, None], x, 0.0)
            step = x - before
            tl.store(partial, tl.sum(tl.where(takes_part, energy, 0.0), 0))
            tl.store(partial + changes, tl.sum(tl.sum(step * step, 1), 0))
            partial += programs
            before = x
        wants_norms = (layer >= norms_start) & (layer < norms_stop)
        tl.store(norms + row, inverse_norm(energy), mask=mask_if(is_row, wants_norms))
        norms += N
    if SUMS:
        tl.store(partial + changes, tl.sum(takes_part.to(tl.float32), 0))


@triton.jit
def _row_sums(row_ptr, exists, width, LAYERS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of `width` numbers from each of `row_ptr` `[LAYERS]` on, in a fixed order; 0 where there is no row."""
    total = tl.zeros((LAYERS, BLOCK), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        total += tl.load(
            row_ptr[:, None] + column[None, :], mask=exists[:, None] & (column < width)[None, :], other=0.0
        )
    return tl.sum(total, 1)


@kernel("mi_width", "width", "walked", "first", "num_mi", "num_steps", "mi_weight", "stability_weight", "eps", "D")
def _finalize_kernel(
    mi_partials_ptr,  # [num_mi, mi_width]
    divisor_ptr,  # 0-d, of the MI loss's sums over pairs
    num_mi,
    mi_width,
    partials_ptr,  # [2 * walked + 1, width] of the stability loss, see `_stability_forward_kernel`
    num_steps,
    width,
    walked,
    first,  # the stability loss's first layer among those walked
    D,
    eps,
    mi_weight,  # in the total
    stability_weight,
    means_ptr,  # [num_mi] out
    losses_ptr,  # [num_steps] out, r_l
    scale_ptr,  # [num_steps] out, k_l
    mi_ptr,  # 0-d out, the mean of the means
    stability_ptr,  # 0-d out, the sum of r_l
    loss_ptr,  # 0-d out, the total
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one program. From partial sums to the losses of each layer, some layers at a time, and to the total.

    A single program, because the total needs all layers: what several would save is less than another launch takes.
    """
    at = tl.arange(0, LAYERS)
    divisor = tl.load(divisor_ptr)
    mi = 0.0
    for start in range(0, num_mi, LAYERS):
        layer = start + at
        exists = layer < num_mi
        mean = _row_sums(mi_partials_ptr + layer.to(tl.int64) * mi_width, exists, mi_width, LAYERS, BLOCK) / divisor
        tl.store(means_ptr + layer, mean, mask=exists)
        mi += tl.sum(tl.where(exists, mean, 0.0), 0)
    mi /= tl.maximum(num_mi, 1)
    is_counted = mask_if(at == 0, num_steps > 0)  # without a step nobody has written there
    rows = _row_sums(partials_ptr + 2 * walked.to(tl.int64) * width + at, is_counted, width, LAYERS, BLOCK)
    count = tl.maximum(tl.sum(rows, 0) * D, 1.0)
    stability = 0.0
    for start in range(0, num_steps, LAYERS):
        step = start + at
        exists = step < num_steps
        energy = partials_ptr + (first + step).to(tl.int64) * width
        energies = _row_sums(energy, exists, width, LAYERS, BLOCK)
        energies += _row_sums(energy + width, exists, width, LAYERS, BLOCK)
        change = _row_sums(energy + (walked + 1).to(tl.int64) * width, exists, width, LAYERS, BLOCK)
        denominator = energies / count + eps
        loss = change / count / denominator
        tl.store(losses_ptr + step, loss, mask=exists)
        tl.store(scale_ptr + step, 2.0 / (count * denominator), mask=exists)
        stability += tl.sum(tl.where(exists, loss, 0.0), 0)
    tl.store(mi_ptr, mi)
    tl.store(stability_ptr, stability)
    tl.store(loss_ptr, mi_weight * mi + stability_weight * stability)


@triton.jit
def step_weights(losses_ptr, scale_ptr, upstream, step, num_steps):
    """`k_l` and `k_l r_l` of a step, both times the upstream gradient; 0 for a step that the loss does not have."""
    grad_ptr, grad_stride, factor = upstream
    exists = (step >= 0) & (step < num_steps)
    weight = factor * tl.load(grad_ptr + step * grad_stride, mask=exists, other=0.0)
    weight *= tl.load(scale_ptr + step, mask=exists, other=0.0)
    return weight, weight * tl.load(losses_ptr + step, mask=exists, other=0.0)


@triton.jit
def stencil_weights(losses_ptr, scale_ptr, upstream, layer, start, num_steps):
    """A layer's `k_{l-1}`, `k_l` and `-(k_{l-1} r_{l-1} + k_l r_l)`, times upstream, for `tiles.stencil`.

    Args:
        losses_ptr, scale_ptr: `[num_steps]`.
        upstream: the pointer to a number for each step, their stride, and what they are multiplied by.
        layer: its number among all.
        start: of the loss's layers.
    """
    before, pull_before = step_weights(losses_ptr, scale_ptr, upstream, layer - start - 1, num_steps)
    after, pull_after = step_weights(losses_ptr, scale_ptr, upstream, layer - start, num_steps)
    return before, after, -(pull_before + pull_after)


@kernel("start", "num_steps", "grad_losses_stride", "stability_factor", "skip_start", "skip_stop", "L", "N")
def _stability_backward_kernel(
    hidden_table,  # [L] of [N, D]
    out_table,  # [L] of [N, D], 0 for a layer without gradient
    mask_ptr,  # [N] uint8
    losses_ptr,  # [num_steps]
    scale_ptr,  # [num_steps]
    grad_losses_ptr,  # [num_steps] upstream, with a stride; 0-d with one of 0
    grad_losses_stride,
    stability_factor,  # of what is upstream
    start,  # the loss's first layer
    num_steps,
    skip_start,  # layers from here
    skip_stop,  # to before here are not written
    L,
    N,
    D,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: blocks of rows x blocks of D. All gradients but the skipped; zeros for layers and rows outside the loss."""
    row = pid64(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    is_row = row < N
    takes_part = is_row
    if HAS_MASK:
        takes_part &= tl.load(mask_ptr + row, mask=is_row, other=0) != 0
    inside = is_row[:, None] & (column < D)[None, :]
    reads = takes_part[:, None] & (column < D)[None, :]
    offset = row[:, None] * D + column[None, :]  # [BLOCK_ROWS, BLOCK_D]

    upstream = (grad_losses_ptr, grad_losses_stride, stability_factor)
    # rolling through the layers: h_l, h_l - h_{l-1}, and the weights of the step between them
    first = layer_pointer(hidden_table, start, DTYPE, ALIGNMENT)
    x = load_rows(first, offset, mask_if(reads, num_steps > 0))
    step_in = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    before = 0.0
    pull_before = 0.0
    for layer in tl.range(0, L):
        step = layer - start
        after, pull_after = step_weights(losses_ptr, scale_ptr, upstream, step, num_steps)
        has_after = (step >= 0) & (step < num_steps)
        following = layer_pointer(hidden_table, layer + has_after.to(tl.int32), DTYPE, ALIGNMENT)
        next_x = load_rows(following, offset, mask_if(reads, has_after))
        step_out = tl.where(has_after, next_x - x, 0.0)
        gradient = before * step_in - after * step_out - (pull_before + pull_after) * x
        in_loss = (step >= 0) & (step <= num_steps) & (num_steps > 0)
        gradient = tl.where(in_loss, gradient, 0.0)
        writes = has_layer(out_table, layer) & ((layer < skip_start) | (layer >= skip_stop))
        out = layer_pointer(out_table, layer, DTYPE, ALIGNMENT)
        tl.store(out + offset, rounded(gradient, DTYPE, INTERPRETED), mask=mask_if(inside, writes))
        step_in = step_out
        x = tl.where(has_after, next_x, x)
        before = after
        pull_before = pull_after
