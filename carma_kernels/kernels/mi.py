"""The MI loss against all negatives of a group, one tile of the Gram matrix at a time; `mi_backward` has its gradient.

Everything is addressed in *rank space* (`carma_kernels._ranks`): the A anchors of a group come first, then its other
valid tokens, V in all, then padding. With `s_ij` the similarity of anchor i and key j, `z_i` the log-sum-exp of an
anchor's negatives, `z'_i` the same with `match_negatives` added, and `sigma_ij = sigmoid(z'_i - s_ij)`,

    loss          = sum over pairs of softplus(z'_i - s_ij)
    d loss/d s_ij = W_ij = -sigma_ij                            for a positive j of i
                           exp(s_ij - z_i) sum_j' sigma_ij'     for a negative j of i

    scores        tiles of anchors x keys -> each anchor's sum of exp(s) over the tile's negatives, its pairs' scores
    statistics    these -> of each anchor z' and a factor, from which W is made; the loss; and sum W s, from which the
                  temperature's gradient is made, `d s/d tau = -s / tau`

A negative's W is `exp(s_ij - shift) factor_i`, with z'_i for a shift, or 1/tau where that bounds all scores (BOUNDED).
"""

import triton
import triton.language as tl

from carma_kernels.kernels.jit import kernel
from carma_kernels.kernels.tiles import (
    dot,
    gram_accumulator,
    layer_pointer,
    log_of_sum,
    negatives_factor,
    place_in_grid,
    softplus_sigmoid,
)

NO_WORD = tl.constexpr(-1)
NO_ANCHOR = tl.constexpr(-2)  # the word of a row that is no anchor: neither a key's word nor NO_WORD
MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def group_sizes(size_ptr, group):
    """A and V of a group, from `[S, 2]`."""
    return tl.load(size_ptr + 2 * group), tl.load(size_ptr + 2 * group + 1)


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns.

    Epilogues work on a tile piece by piece: of a whole one, what belongs to its columns would not fit in registers.
    """
    return tile.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()


@triton.jit
def gram(
    hidden_ptr,  # [N, D], a group of a layer
    row,  # [BLOCK_M] tokens of the group
    column,  # [BLOCK_N]
    D,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`h_i . h_j` `[BLOCK_M, BLOCK_N]`."""
    row_ptr = hidden_ptr + row[:, None].to(tl.int64) * D
    column_ptr = hidden_ptr + column[:, None].to(tl.int64) * D
    dots = gram_accumulator(BLOCK_M, BLOCK_N, INTERPRETED)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)[None, :]
        if EVEN_D:
            rows = tl.load(row_ptr + offs_d)
            columns = tl.load(column_ptr + offs_d)
        else:
            rows = tl.load(row_ptr + offs_d, mask=offs_d < D, other=0.0)
            columns = tl.load(column_ptr + offs_d, mask=offs_d < D, other=0.0)
        dots = dot(rows, tl.trans(columns), dots, PRECISION, INTERPRETED)
    return dots.to(tl.float32)


@triton.jit
def may_hold_positives(anchor_word, key_word):
    """Whether a word may be among both the anchors and the keys of a tile. Few tiles hold positives."""
    first = tl.min(tl.where(anchor_word >= 0, anchor_word, 2147483647), 0)
    first_key = tl.min(tl.where(key_word >= 0, key_word, 2147483647), 0)
    return (tl.max(key_word, 0) >= first) & (first_key <= tl.max(anchor_word, 0))


@kernel("first_layer", "first_state", "num_layers", "S", "N", "A", "P")
def _mi_scores_kernel(
    hidden_table,  # [L] addresses of [S, N, D]
    token_ptr,  # [S, R]
    word_ptr,  # [S, R]
    size_ptr,  # [S, 2]
    first_pair_ptr,  # [S, A+1]
    inverse_norm_ptr,  # [layers, S, N]
    inverse_temperature_ptr,  # 0-d
    pair_score_ptr,  # [layers of this launch, P]
    partial_ptr,  # [S, layers of this launch, key blocks, 3, A]; BOUNDED: [.., 1, A]; see _add_negatives
    first_layer,  # of this launch, in the table
    first_state,  # and among the loss's layers
    num_layers,
    S,
    N,
    D,
    R,
    A,
    P,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    COSINE: tl.constexpr,
    BOUNDED: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One tile of anchors x keys. Grid: tiles, fastest, * layers * groups S."""
    anchor_blocks = tl.cdiv(A, BLOCK_M)
    key_blocks = tl.cdiv(N, BLOCK_N)
    number, place, group = place_in_grid(anchor_blocks * key_blocks, num_layers)
    tile = number.to(tl.int32)
    anchor_start = tile % anchor_blocks * BLOCK_M
    key_block = tile // anchor_blocks
    key_start = key_block * BLOCK_N
    num_anchors, num_valid = group_sizes(size_ptr, group)
    if (anchor_start >= num_anchors) | (key_start >= num_valid):
        return
    layer = first_layer + place
    hidden_ptr = layer_pointer(hidden_table, layer, DTYPE, ALIGNMENT) + group * N * D
    token_ptr += group * R
    word_ptr += group * R
    rank = anchor_start + tl.arange(0, BLOCK_M)
    is_anchor = rank < num_anchors
    anchor_token = tl.load(token_ptr + tl.minimum(rank, num_anchors - 1))
    key_token = tl.load(token_ptr + tl.minimum(key_start + tl.arange(0, BLOCK_N), num_valid - 1))
    dots = gram(hidden_ptr, anchor_token, key_token, D, EVEN_D, PRECISION, INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_D)
    inverse_temperature = tl.load(inverse_temperature_ptr)
    scale = tl.zeros((BLOCK_M,), tl.float32) + inverse_temperature
    if COSINE:
        inverse_norm_ptr += ((first_state + place) * S + group) * N
        scale *= tl.load(inverse_norm_ptr + anchor_token)
    anchor_word = tl.where(is_anchor, tl.load(word_ptr + rank), NO_ANCHOR)
    tables = (token_ptr, word_ptr, inverse_norm_ptr)
    key_word = tl.load(word_ptr + key_start + tl.arange(0, BLOCK_N))
    if may_hold_positives(anchor_word, key_word):
        first_pair = tl.load(first_pair_ptr + group * (A + 1) + rank, mask=is_anchor, other=0)
        anchors = (scale, anchor_word, anchor_token, first_pair - anchor_token - 1)
        pair_score_ptr = pair_score_ptr + place * P
        _store_positives(dots, anchors, key_start, tables, pair_score_ptr, COSINE, BLOCK_M, BLOCK_N, PIECES)
    none = tl.zeros((BLOCK_M,), tl.float32)
    maximum, total, slope = _add_negatives(
        dots,
        (none + MINUS_INFINITY, none, none),
        (scale, anchor_word),
        key_start,
        tables,
        inverse_temperature,
        COSINE,
        BOUNDED,
        BLOCK_M,
        BLOCK_N,
        PIECES,
    )
    partials = (group * num_layers + place) * key_blocks + key_block
    if BOUNDED:
        tl.store(partial_ptr + partials * A + rank, total, mask=is_anchor)
    else:
        partial_ptr += partials * 3 * A + rank
        tl.store(partial_ptr, maximum, mask=is_anchor)
        tl.store(partial_ptr + A, total, mask=is_anchor)
        tl.store(partial_ptr + 2 * A, slope, mask=is_anchor)


@triton.jit
def scores(dots, scale, key, tables, COSINE: tl.constexpr):
    """The similarities of a tile, and the words of its keys; `scale` `[BLOCK_M]` is that of the anchors."""
    token_ptr, word_ptr, inverse_norm_ptr = tables
    score = dots * scale[:, None]
    if COSINE:
        score *= tl.load(inverse_norm_ptr + tl.load(token_ptr + key))[None, :]
    return score, tl.load(word_ptr + key)


@triton.jit
def _store_positives(
    dots,  # [BLOCK_M, BLOCK_N]
    anchors,  # scale, word, token, and what with a positive's token makes the number of the pair: [BLOCK_M] each
    key_start,
    tables,
    pair_score_ptr,  # [P]
    COSINE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Store the scores of a tile's pairs."""
    if PIECES > 1:
        left, right = halves(dots, BLOCK_M, BLOCK_N)
        HALF: tl.constexpr = BLOCK_N // 2
        _store_positives(left, anchors, key_start, tables, pair_score_ptr, COSINE, BLOCK_M, HALF, PIECES // 2)
        _store_positives(right, anchors, key_start + HALF, tables, pair_score_ptr, COSINE, BLOCK_M, HALF, PIECES // 2)
    else:
        scale, word, token, pair_offset = anchors
        key = key_start + tl.arange(0, BLOCK_N)
        score, key_word = scores(dots, scale, key, tables, COSINE)
        key_token = tl.load(tables[0] + key)
        is_positive = (word[:, None] == key_word[None, :]) & (key_token[None, :] > token[:, None])
        tl.store(pair_score_ptr + pair_offset[:, None] + key_token[None, :], score, mask=is_positive)


@triton.jit
def _add_negatives(
    dots,  # [BLOCK_M, BLOCK_N]
    so_far,  # maximum, sum of exp, sum of exp times s: [BLOCK_M] each; BOUNDED: the second alone, with 1/tau as maximum
    anchors,  # scale, word: [BLOCK_M] each
    key_start,
    tables,
    inverse_temperature,
    COSINE: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Add a tile's negatives to each anchor's sums."""
    if PIECES > 1:
        left, right = halves(dots, BLOCK_M, BLOCK_N)
        HALF: tl.constexpr = BLOCK_N // 2
        so_far = _add_negatives(
            left, so_far, anchors, key_start, tables, inverse_temperature, COSINE, BOUNDED, BLOCK_M, HALF, PIECES // 2
        )
        key_start += HALF
        return _add_negatives(
            right, so_far, anchors, key_start, tables, inverse_temperature, COSINE, BOUNDED, BLOCK_M, HALF, PIECES // 2
        )
    scale, word = anchors
    score, key_word = scores(dots, scale, key_start + tl.arange(0, BLOCK_N), tables, COSINE)
    is_negative = (key_word != NO_WORD)[None, :] & (word[:, None] != key_word[None, :])
    return add_scores(score, is_negative, so_far, inverse_temperature, BOUNDED)


@triton.jit
def add_scores(score, is_negative, so_far, inverse_temperature, BOUNDED: tl.constexpr):
    """Add those scores of a tile that are negatives' to the sums of its rows, as `_add_negatives` has them."""
    before, total, slope = so_far
    maximum = before
    if BOUNDED:
        total += tl.sum(tl.exp(tl.where(is_negative, score - inverse_temperature, MINUS_INFINITY)), 1)
    else:
        maximum = tl.maximum(before, tl.max(tl.where(is_negative, score, MINUS_INFINITY), 1))
        shift = tl.where(maximum == MINUS_INFINITY, 0.0, maximum)  # no negative so far: not -inf minus -inf
        decay = tl.exp(before - shift)
        weight = tl.exp(tl.where(is_negative, score - shift[:, None], MINUS_INFINITY))
        total = total * decay + tl.sum(weight, 1)
        slope = slope * decay + tl.sum(weight * score, 1)
    return maximum, total, slope


@kernel("first_state", "num_layers", "S", "N", "A", "P")
def _mi_statistics_kernel(
    size_ptr,  # [S, 2]
    first_pair_ptr,  # [S, A+1]
    num_negatives_ptr,  # [S, A]
    token_ptr,  # [S, R]
    inverse_norm_ptr,  # [layers, S, N]
    inverse_temperature_ptr,  # 0-d
    pair_score_ptr,  # [layers of this launch, P]
    partial_ptr,  # as in _mi_scores_kernel
    anchor_state_ptr,  # [layers, S, 2, A] z' and the factor of the negatives' weights
    sums_ptr,  # [layers, 2, S * anchor blocks] sum W s, and sum of the anchors' inverse norms
    loss_ptr,  # [layers, S * anchor blocks]
    log_match,  # log(match_negatives)
    first_state,
    num_layers,
    S,
    N,
    R,
    A,
    P,
    COSINE: tl.constexpr,
    BOUNDED: tl.constexpr,
    MATCH: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Some anchors' statistics, from all their tiles in order. Grid: anchor blocks, fastest, * layers * groups S."""
    anchor_blocks = tl.cdiv(A, BLOCK_A)
    anchor_block, place, group = place_in_grid(anchor_blocks, num_layers)
    matrix = group * num_layers + place
    state = first_state + place
    num_anchors, num_valid = group_sizes(size_ptr, group)
    rank = anchor_block.to(tl.int32) * BLOCK_A + tl.arange(0, BLOCK_A)
    is_anchor = rank < num_anchors
    inverse_temperature = tl.load(inverse_temperature_ptr)

    maximum = tl.full((BLOCK_A,), MINUS_INFINITY, tl.float32)
    total = tl.zeros((BLOCK_A,), tl.float32)
    slope = tl.zeros((BLOCK_A,), tl.float32)
    if BOUNDED:
        partial_ptr += matrix * tl.cdiv(N, KEY_BLOCK) * A + rank
        for _ in range(tl.cdiv(num_valid, KEY_BLOCK)):
            total += tl.load(partial_ptr, mask=is_anchor, other=0.0)
            partial_ptr += A
        maximum = tl.full((BLOCK_A,), 0.0, tl.float32) + inverse_temperature
    else:
        partial_ptr += matrix * tl.cdiv(N, KEY_BLOCK) * 3 * A + rank
        for _ in range(tl.cdiv(num_valid, KEY_BLOCK)):
            tile_maximum = tl.load(partial_ptr, mask=is_anchor, other=MINUS_INFINITY)
            before = maximum
            maximum = tl.maximum(before, tile_maximum)
            so_far = tl.where(maximum == MINUS_INFINITY, 0.0, maximum)
            decay = tl.exp(before - so_far)
            tile_decay = tl.exp(tile_maximum - so_far)
            total = total * decay + tl.load(partial_ptr + A, mask=is_anchor, other=0.0) * tile_decay
            slope = slope * decay + tl.load(partial_ptr + 2 * A, mask=is_anchor, other=0.0) * tile_decay
            partial_ptr += 3 * A
    mean_score = slope / tl.where(total > 0, total, 1.0)  # of the negatives, each weighted with exp(s - z)

    matched = matched_log_sum(maximum, total, num_negatives_ptr + group * A + rank, is_anchor, log_match, MATCH)
    pair = tl.load(first_pair_ptr + group * (A + 1) + rank, mask=is_anchor, other=0)
    num_positives = tl.load(first_pair_ptr + group * (A + 1) + rank + 1, mask=is_anchor, other=0) - pair
    pair_score_ptr += place * P
    loss = tl.zeros((BLOCK_A,), tl.float32)
    pull = tl.zeros((BLOCK_A,), tl.float32)
    work = tl.zeros((BLOCK_A,), tl.float32)
    for place in range(tl.max(num_positives, 0)):
        exists = place < num_positives
        score = tl.load(pair_score_ptr + pair + place, mask=exists, other=0.0)
        cost, sigma = softplus_sigmoid(matched - score)
        loss += tl.where(exists, cost, 0.0)
        pull += tl.where(exists, sigma, 0.0)
        work += tl.where(exists, sigma * (mean_score - score), 0.0)

    anchor_state_ptr += (state * S + group) * 2 * A + rank
    scale = tl.zeros((BLOCK_A,), tl.float32)
    if COSINE:
        token = tl.load(token_ptr + group * R + rank, mask=is_anchor, other=0)
        inverse_norm_ptr += (state * S + group) * N
        scale = tl.load(inverse_norm_ptr + token, mask=is_anchor, other=0.0)
    blocks = S * anchor_blocks
    block = group * anchor_blocks + anchor_block
    sums_ptr += state * 2 * blocks + block
    out = (anchor_state_ptr, sums_ptr, loss_ptr + state * blocks + block)
    store_statistics(out, A, rank < A, blocks, (matched, maximum, total), (loss, pull, work, scale), BOUNDED)


@triton.jit
def matched_log_sum(maximum, total, num_negatives_ptr, is_anchor, log_match, MATCH: tl.constexpr):
    """z' of some anchors, from their negatives' `sum of exp(s - maximum)` and pointers to their number."""
    matched = log_of_sum(maximum, total)
    if MATCH:
        count = tl.load(num_negatives_ptr, mask=is_anchor, other=0)
        matched += log_match - tl.log(tl.maximum(count, 1).to(tl.float32))
    return matched


@triton.jit
def store_statistics(out, A, in_state, blocks, log_sums, sums, BOUNDED: tl.constexpr):
    """Store what a block of anchors leaves.

    Args:
        out: pointers to the anchors' z', and to the block's first sum and loss.
        A: from an anchor's z' to its factor.
        in_state: which anchors have a place there.
        blocks: from the first to the second sum.
        log_sums: z', maximum, total: `[BLOCK_A]` each.
        sums: loss, sum of sigmoids, work, inverse norm of each anchor.
    """
    state_ptr, sums_ptr, loss_ptr = out
    matched, maximum, total = log_sums
    loss, pull, work, inverse_norm = sums
    tl.store(state_ptr, matched, mask=in_state)
    shift = maximum if BOUNDED else matched
    tl.store(state_ptr + A, negatives_factor(pull, shift, maximum, total), mask=in_state)
    tl.store(sums_ptr, tl.sum(work, 0))
    tl.store(sums_ptr + blocks, tl.sum(inverse_norm, 0))
    tl.store(loss_ptr, tl.sum(loss, 0))
