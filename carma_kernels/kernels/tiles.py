"""Device functions that the kernels share.

Layers come through a table of addresses, so that a list of layers is read as it lies; an address of 0 stands for a
layer that gets no gradient. Offsets are int64 up to the row of a sequence, int32 within a sequence.

Two constants go through all kernels: `INTERPRETED`, that Triton's interpreter runs them, whose bfloat16 arithmetic
needs help, and `ALIGNMENT`, in bytes, of every layer that a kernel reads or writes: the compiler cannot see it in a
table, and loads 2 bytes at a time where it is not promised.
"""

import triton
import triton.language as tl

ZERO_NORM_SQUARED = tl.constexpr(1e-16)
"""Square of `_terms.ZERO_NORM`."""

BELOW_ALL = tl.constexpr(-1e38)


@triton.jit
def pid64(axis: tl.constexpr):
    """The program's number along a grid axis, as int64: offsets made of it cannot overflow."""
    return tl.program_id(axis).to(tl.int64)


@triton.jit
def place_in_grid(fastest, middle):
    """The program's numbers, int64, along three axes of these sizes and any, in a grid of one axis.

    That is the only axis with room for more than 65,535 programs, and programs start in its order: what is read at the
    same time should be near in it.
    """
    program = tl.program_id(0)  # `launch` refuses more than int32 can number
    rest = program // fastest
    return (program % fastest).to(tl.int64), (rest % middle).to(tl.int64), (rest // middle).to(tl.int64)


@triton.jit
def layer_pointer(table, layer, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The first element of a layer `[B, T, D]`."""
    address = tl.load(table + layer)
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def has_layer(table, layer):
    """Whether the table holds this layer."""
    return tl.load(table + layer) != 0


@triton.jit
def mask_if(mask, condition):
    """A block's mask where a condition on the whole block holds, and nothing otherwise.

    The interpreter broadcasts a condition as a number, and from Triton 3.9 on does not take numbers for a mask;
    compiled, the comparison is nothing.
    """
    return (mask & condition) != 0


@triton.jit
def load_rows(layer_ptr, offset, mask):
    """Elements of a layer in fp32, 0 where masked."""
    return tl.load(layer_ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_factor(layer_ptr, offset, mask):
    """Elements of a layer as they lie, 0 where masked, for a `dot` in a loop and for nothing else.

    Triton gives a tile that a pipelined product shares with another use a buffer too few, and on sm_90 overwrites it
    while the tensor cores read it (triton-lang/triton#6691). Whoever needs the elements elsewhere loads them again; the
    cache modifier, which is what a load does anyway, keeps the compiler from taking the two loads for one.
    """
    return tl.load(layer_ptr + offset, mask=mask, other=0.0, cache_modifier=".ca")


@triton.jit
def rounded(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 to DTYPE, to the nearest even: the interpreter would cut bfloat16 off instead."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """`accumulator + a @ b`; the interpreter's dot of bfloat16 is wrong, that of its values in fp64 is exact."""
    if INTERPRETED:
        return (accumulator + tl.dot(a.to(tl.float64), b.to(tl.float64))).to(accumulator.dtype)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def gram_accumulator(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRETED: tl.constexpr):
    """Zeros to sum up the products of tokens with each other; the sum is to be cast to fp32.

    Forward and backward must come to the same bits, of `h_i . h_j` as of `h_j . h_i`: a dot product of a million has a
    last digit that decides what its exponential is. A device sums over D in order, wherever in a tile a product lies;
    the interpreter does not, but agrees with itself in fp64. Cosines of fp32, in parts of bfloat16, may differ in the
    last digit between (i, j) and (j, i), but not between forward and backward: see `ops.layers.mi_precision`.
    """
    return tl.zeros((BLOCK_M, BLOCK_N), tl.float64 if INTERPRETED else tl.float32)


@triton.jit
def inverse_norm(sum_of_squares):
    """`1/|h|`, and 0 for a vector of no length, which so has similarity 0 and gradient 0."""
    long_enough = sum_of_squares > ZERO_NORM_SQUARED
    return tl.where(long_enough, tl.rsqrt(tl.where(long_enough, sum_of_squares, 1.0)), 0.0)


@triton.jit
def softplus_sigmoid(x):
    """`log(1 + e^x)` and `1 / (1 + e^-x)`; both 0 at minus infinity."""
    e = tl.exp(-tl.abs(x))
    # log(1 + e) loses the digits of a small e; the quotient makes up for what 1 + e has rounded off
    one_plus = 1.0 + e
    log1p = tl.where(one_plus == 1.0, e, tl.log(one_plus) * (e / tl.where(one_plus == 1.0, 1.0, one_plus - 1.0)))
    return tl.maximum(x, 0.0) + log1p, tl.where(x >= 0, 1.0, e) / one_plus


@triton.jit
def negatives_factor(pull, shift, largest, total):
    """What times `exp(s - shift)` is the weight of an anchor's negative, `pull exp(s) / sum of exp(s)`; 0 without any.

    The similarity is so subtracted from a number of its own size before anything else is done with it: dot products may
    be in the thousands. Whatever digits `shift` itself has lost there, the weights add up to `pull`.

    Args:
        pull: the sum of sigmoids over the anchor's positives.
        shift: anything about as large as the largest s.
        largest, total: the negatives' `sum of exp(s - largest)`.
    """
    some = total != 0  # also a NaN, which must not be lost
    factor = tl.exp(tl.where(some, shift - largest, 0.0)) / tl.where(some, total, 1.0)
    return tl.where(some, pull * factor, 0.0)


@triton.jit
def stencil(x, table, layer, offset, mask, before, after, own, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The stability loss's gradient of a tile of a layer, in fp32; 0 where masked.

    `k_{l-1} (h_l - h_{l-1}) - k_l (h_{l+1} - h_l) - (k_{l-1} r_{l-1} + k_l r_l) h_l`, from differences because close
    layers would cancel otherwise. A neighbour whose weight is 0 is not read, nor is `x` then used.

    Args:
        x: the tile of layer `layer`, fp32.
        table: of the hidden states.
        layer: its number there.
        offset: of the tile's elements in a layer.
        mask: the elements that take part, a block of the tile's shape.
        before, after, own: as `stability.stencil_weights` returns them.
    """
    previous, following = neighbours(table, layer, before, after, DTYPE, ALIGNMENT)
    return stencil_of(x, previous, following, offset, mask, before, after, own)


@triton.jit
def neighbours(table, layer, before, after, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The layers before and after; in place of one whose weight is 0, and which may not exist, the layer itself."""
    previous = layer_pointer(table, layer - (before != 0).to(tl.int32), DTYPE, ALIGNMENT)
    following = layer_pointer(table, layer + (after != 0).to(tl.int32), DTYPE, ALIGNMENT)
    return previous, following


@triton.jit
def stencil_of(x, previous, following, offset, mask, before, after, own):
    """`stencil` with the `neighbours` at hand: in a loop, their addresses are to be loaded before it."""
    # as integers: the interpreter does not broadcast a comparison of single floats
    has_before = mask_if(mask, (before != 0).to(tl.int32) > 0)
    has_after = mask_if(mask, (after != 0).to(tl.int32) > 0)
    gradient = tl.where(has_before, before * (x - load_rows(previous, offset, has_before)), 0.0)
    gradient -= tl.where(has_after, after * (load_rows(following, offset, has_after) - x), 0.0)
    return gradient + tl.where(has_before | has_after, own * x, 0.0)


@triton.jit
def log_of_sum(largest, total):
    """`largest + log(total)`; for an empty sum a number below all others, finite so that it can be subtracted."""
    empty = total == 0
    return tl.where(empty, BELOW_ALL, largest + tl.log(tl.where(empty, 1.0, total)))
