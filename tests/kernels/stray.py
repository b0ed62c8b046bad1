"""A kernel that writes where it is told to, to see whether it is noticed."""

import triton
import triton.language as tl


@triton.jit
def stray_kernel(out_ptr, first, stop):
    """Zeros from `first` to before `stop`."""
    place = first + tl.arange(0, 16)
    tl.store(out_ptr + place, tl.zeros((16,), tl.float32), mask=place < stop)
