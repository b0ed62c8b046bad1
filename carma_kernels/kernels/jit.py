"""What a kernel is compiled for: never the sizes of a batch, nor where its tables happen to lie in memory."""

import inspect
from collections.abc import Callable
from typing import Any

import triton


def kernel(*sizes: str, aligned: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Any]:
    """`triton.jit`, without a version for every kind of number and address that a batch may bring.

    Triton compiles again for a number that is 1 or that 16 divides, and for a pointer whose address 16 divides, in the
    middle of training. The pointers of our kernels are to tables that are read a number at a time, which gain nothing
    by it; the layers themselves come by address and say how they lie (`tiles.layer_pointer`).

    Args:
        sizes: the parameters that a batch decides.
        aligned: pointers to be read 16 bytes at a time. What is passed there lies at such an address, always.
    """

    def decorate(function: Callable[..., None]) -> Any:
        names = inspect.signature(function).parameters
        pointers = [name for name in names if name.endswith(("_ptr", "_table")) and name not in aligned]
        return triton.jit(do_not_specialize=list(sizes), do_not_specialize_on_alignment=pointers)(function)

    return decorate
