"""The similarity of every token to every other of its sequence, in every layer, and its gradient.

    s_ij = h_i.h_j r_i r_j / tau

    d/dh_i = r_i / tau * (sum_j m_ij r_j h_j - r_i^2 c_i h_i),      m_ij = G_ij + G_ji
    c_i    = sum_j m_ij r_j (h_i.h_j)

with `G` the upstream gradient and `r` the inverse norms (the dot product has r = 1 and no term of `c_i`). The matrix is
symmetric: the forward computes the tiles from the diagonal upwards and stores each twice, the backward takes from each
the `c` of its rows and of its columns.

A token that the mask leaves out is read as zeros and has r = 0, so that its rows and columns come out as 0.
"""

import triton
import triton.language as tl

from carma_kernels.kernels.jit import kernel
from carma_kernels.kernels.tiles import dot, has_layer, inverse_norm, layer_pointer, place_in_grid, rounded


@kernel("B", "T")
def _similarity_norms_kernel(
    hidden_table,  # [L] addresses of [B, T, D]
    valid_ptr,  # [B, T] uint8
    inverse_norm_ptr,  # [L, B, T]
    B,
    T,
    D,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`1/|h|` of some tokens of a sequence, 0 for those left out. Grid: blocks of tokens, fastest, * B * L."""
    block, sequence, layer = place_in_grid(tl.cdiv(T, BLOCK_T), B)
    sequence_ptr = _sequence(hidden_table, layer, sequence, T, D, DTYPE, ALIGNMENT)
    place = layer * B + sequence
    token = block.to(tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_valid = _is_valid(valid_ptr, sequence * T, token, T, HAS_MASK)  # [BLOCK_T]
    sum_of_squares = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, D, BLOCK_D):
        x = _load_piece(sequence_ptr, token, is_valid, start, D, BLOCK_D, INTERPRETED).to(tl.float32)
        sum_of_squares += tl.sum(x * x, 1)
    tl.store(inverse_norm_ptr + place * T + token, inverse_norm(sum_of_squares), mask=token < T)


@kernel("B", "T")
def _similarity_forward_kernel(
    hidden_table,  # [L] addresses of [B, T, D]
    valid_ptr,  # [B, T] uint8
    inverse_norm_ptr,  # [L, B, T]
    inverse_temperature_ptr,  # 0-d
    matrix_ptr,  # [L, B, T, T]
    B,
    T,
    D,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile and its mirror image. Grid: tiles, fastest, * B * L; those below the diagonal are images and return."""
    num_blocks = tl.cdiv(T, BLOCK_T)
    number, sequence, layer = place_in_grid(num_blocks * num_blocks, B)
    tile = number.to(tl.int32)
    first_i = tile // num_blocks * BLOCK_T
    first_j = tile % num_blocks * BLOCK_T
    if first_j < first_i:
        return
    sequence_ptr = _sequence(hidden_table, layer, sequence, T, D, DTYPE, ALIGNMENT)
    place = layer * B + sequence
    first = sequence * T
    i = first_i + tl.arange(0, BLOCK_T)
    j = first_j + tl.arange(0, BLOCK_T)
    score = _gram(
        sequence_ptr,
        i,
        j,
        _is_valid(valid_ptr, first, i, T, HAS_MASK),
        _is_valid(valid_ptr, first, j, T, HAS_MASK),
        D,
        PRECISION,
        INTERPRETED,
        BLOCK_T,
        BLOCK_D,
    )  # [BLOCK_T, BLOCK_T]
    if COSINE:
        inverse_norm_ptr += place * T
        r_i = tl.load(inverse_norm_ptr + i, mask=i < T, other=0.0)
        r_j = tl.load(inverse_norm_ptr + j, mask=j < T, other=0.0)
        score *= r_i[:, None] * r_j[None, :]
    score = rounded(score * tl.load(inverse_temperature_ptr), matrix_ptr.dtype.element_ty, INTERPRETED)
    matrix_ptr += place * T * T
    i_exists = i < T
    j_exists = j < T
    tl.store(
        _tile(matrix_ptr, first_i, first_j, T, BLOCK_T, BLOCK_T), score, mask=i_exists[:, None] & j_exists[None, :]
    )
    if first_i != first_j:
        mirror_ptr = _tile(matrix_ptr, first_j, first_i, T, BLOCK_T, BLOCK_T)
        tl.store(mirror_ptr, tl.trans(score), mask=j_exists[:, None] & i_exists[None, :])


@kernel("B", "T")
def _similarity_projection_kernel(
    hidden_table,  # [L] addresses of [B, T, D]
    valid_ptr,  # [B, T] uint8
    inverse_norm_ptr,  # [L, B, T]
    grad_ptr,  # [L, B, T, T]
    projection_ptr,  # [L, B, ceil(T / BLOCK_T), T]: of c_i what comes from a block of tokens j
    B,
    T,
    D,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What a tile adds to the `c` of its rows and of its columns. Grid as in the forward."""
    num_blocks = tl.cdiv(T, BLOCK_T)
    number, sequence, layer = place_in_grid(num_blocks * num_blocks, B)
    tile = number.to(tl.int32)
    first_i = tile // num_blocks * BLOCK_T
    first_j = tile % num_blocks * BLOCK_T
    if first_j < first_i:
        return
    sequence_ptr = _sequence(hidden_table, layer, sequence, T, D, DTYPE, ALIGNMENT)
    place = layer * B + sequence
    first = sequence * T
    i = first_i + tl.arange(0, BLOCK_T)
    j = first_j + tl.arange(0, BLOCK_T)
    i_is_valid = _is_valid(valid_ptr, first, i, T, HAS_MASK)
    j_is_valid = _is_valid(valid_ptr, first, j, T, HAS_MASK)
    gram = _gram(sequence_ptr, i, j, i_is_valid, j_is_valid, D, PRECISION, INTERPRETED, BLOCK_T, BLOCK_D)
    m = _symmetric_gradient(grad_ptr + place * T * T, first_i, first_j, i_is_valid, j_is_valid, T, BLOCK_T, BLOCK_T)
    inverse_norm_ptr += place * T
    projection_ptr += place * num_blocks * T
    m_i = m
    if COSINE:
        m_i = m * tl.load(inverse_norm_ptr + j, mask=j < T, other=0.0)[None, :]
    c_i = tl.sum(_coefficient(m_i, DTYPE, INTERPRETED).to(tl.float32) * gram, 1)
    tl.store(projection_ptr + (first_j // BLOCK_T).to(tl.int64) * T + i, c_i, mask=i < T)
    if first_i != first_j:
        m_j = m
        if COSINE:
            m_j = m * tl.load(inverse_norm_ptr + i, mask=i < T, other=0.0)[:, None]
        c_j = tl.sum(_coefficient(m_j, DTYPE, INTERPRETED).to(tl.float32) * gram, 0)
        tl.store(projection_ptr + (first_i // BLOCK_T).to(tl.int64) * T + j, c_j, mask=j < T)


@kernel("B", "T", "num_projections")
def _similarity_backward_kernel(
    hidden_table,  # [L] addresses of [B, T, D]
    out_table,  # [L] addresses of [B, T, D], 0 for no gradient
    valid_ptr,  # [B, T] uint8
    inverse_norm_ptr,  # [L, B, T]
    inverse_temperature_ptr,  # 0-d
    grad_ptr,  # [L, B, T, T]
    projection_ptr,  # [L, B, num_projections, T]
    B,
    T,
    D,
    num_projections,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A piece of the gradient, some tokens by a part of the width. Grid: pieces, fastest, * B * L."""
    num_parts = tl.cdiv(D, BLOCK_D)
    number, sequence, layer = place_in_grid(tl.cdiv(T, BLOCK_T) * num_parts, B)
    piece = number.to(tl.int32)
    if not has_layer(out_table, layer):
        return
    sequence_ptr = _sequence(hidden_table, layer, sequence, T, D, DTYPE, ALIGNMENT)
    out_ptr = _sequence(out_table, layer, sequence, T, D, DTYPE, ALIGNMENT)
    place = layer * B + sequence
    first = sequence * T
    first_i = piece // num_parts * BLOCK_T
    i = first_i + tl.arange(0, BLOCK_T)
    start = piece % num_parts * BLOCK_D
    i_is_valid = _is_valid(valid_ptr, first, i, T, HAS_MASK)
    inverse_norm_ptr += place * T
    grad_ptr += place * T * T
    x = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first_j in range(0, T, BLOCK_J):
        j = first_j + tl.arange(0, BLOCK_J)
        j_is_valid = _is_valid(valid_ptr, first, j, T, HAS_MASK)
        m = _symmetric_gradient(grad_ptr, first_i, first_j, i_is_valid, j_is_valid, T, BLOCK_T, BLOCK_J)
        if COSINE:
            m *= tl.load(inverse_norm_ptr + j, mask=j < T, other=0.0)[None, :]
        h_j = _load_piece(sequence_ptr, j, j_is_valid, start, D, BLOCK_D, INTERPRETED)
        m = _coefficient(m, DTYPE, INTERPRETED)
        x = dot(m, h_j.to(m.dtype), x, PRECISION, INTERPRETED)
    if COSINE:
        r_i = tl.load(inverse_norm_ptr + i, mask=i < T, other=0.0)
        c_i = tl.zeros((BLOCK_T,), tl.float32)
        for block in range(num_projections):
            offset = (place * num_projections + block) * T
            c_i += tl.load(projection_ptr + offset + i, mask=i < T, other=0.0)
        h_i = _load_piece(sequence_ptr, i, i_is_valid, start, D, BLOCK_D, INTERPRETED).to(tl.float32)
        x = (x - (c_i * r_i * r_i)[:, None] * h_i) * r_i[:, None]
    x = rounded(x * tl.load(inverse_temperature_ptr), DTYPE, INTERPRETED)
    d = start + tl.arange(0, BLOCK_D)
    tl.store(out_ptr + i[:, None] * D + d[None, :], x, mask=(i < T)[:, None] & (d < D)[None, :])


@triton.jit
def _sequence(table, layer, sequence, T, D, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Where a sequence `[T, D]` of a layer starts."""
    return layer_pointer(table, layer, DTYPE, ALIGNMENT) + sequence * T * D


@triton.jit
def _tile(matrix_ptr, first_row, first_column, T, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The entries `[ROWS, COLUMNS]` of a tile of a matrix `[T, T]`, which may have more than 2^31 of them."""
    corner = matrix_ptr + tl.cast(first_row, tl.int64) * T + first_column
    return corner + tl.arange(0, ROWS)[:, None] * T + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _is_valid(valid_ptr, first, token, T, HAS_MASK: tl.constexpr):
    """Which of some tokens of a sequence take part; `first` is the number of its first among all."""
    in_range = token < T
    if HAS_MASK:
        return tl.load(valid_ptr + first + token, mask=in_range, other=0) != 0
    return in_range


@triton.jit
def _load_piece(sequence_ptr, token, is_valid, start, D, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr):
    """Some tokens by a part of the width, `[tokens, BLOCK_D]`, zeros for those left out."""
    d = start + tl.arange(0, BLOCK_D)
    x = tl.load(sequence_ptr + token[:, None] * D + d[None, :], mask=is_valid[:, None] & (d < D)[None, :], other=0.0)
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def _gram(
    sequence_ptr,
    i,
    j,
    i_is_valid,
    j_is_valid,
    D,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`h_i.h_j`, `[BLOCK_T, BLOCK_T]`."""
    gram = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for start in range(0, D, BLOCK_D):
        h_i = _load_piece(sequence_ptr, i, i_is_valid, start, D, BLOCK_D, INTERPRETED)
        h_j = _load_piece(sequence_ptr, j, j_is_valid, start, D, BLOCK_D, INTERPRETED)
        gram = dot(h_i, tl.trans(h_j), gram, PRECISION, INTERPRETED)
    return gram


@triton.jit
def _symmetric_gradient(
    grad_ptr, first_i, first_j, i_is_valid, j_is_valid, T, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    """`G_ij + G_ji`, `[BLOCK_I, BLOCK_J]`; what arrives for tokens left out is not read, it may be anything."""
    of_ij = tl.load(
        _tile(grad_ptr, first_i, first_j, T, BLOCK_I, BLOCK_J),
        mask=i_is_valid[:, None] & j_is_valid[None, :],
        other=0.0,
    )
    of_ji = tl.load(
        _tile(grad_ptr, first_j, first_i, T, BLOCK_J, BLOCK_I),
        mask=j_is_valid[:, None] & i_is_valid[None, :],
        other=0.0,
    )
    return of_ij.to(tl.float32) + tl.trans(of_ji.to(tl.float32))


@triton.jit
def _coefficient(m, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """A coefficient as the matrix units multiply it.

    bfloat16 has the range of what may arrive, float16 has not: its values, coefficients and tokens alike, are
    multiplied as tf32, which holds every digit of float16 and the exponents of fp32. Rounded here, because `c` must be
    summed from the very coefficients that are multiplied: it cancels most of the sum where all tokens are alike.
    """
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        coefficient = rounded(m, DTYPE, INTERPRETED)
    elif DTYPE == tl.float16:  # noqa: SIM300
        bits = m.to(tl.uint32, bitcast=True)
        bits = (bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000
        coefficient = tl.where(m == m, bits.to(tl.float32, bitcast=True), m)
    else:
        coefficient = m
    return coefficient
