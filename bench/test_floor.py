"""What the losses must do at least, counted one by one."""

from __future__ import annotations

import pytest

from bench.floor import Cost, Rates, costs, kernel_cost
from bench.workloads import TINY

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("tiny", TINY, ids=str)
def test_every_product_is_counted(tiny):
    scored, applied = 0, 0
    for words in tiny.spans():
        valid = range(words[-1][1])
        anchors = {i for start, end in words for i in range(start, end - 1)}
        scored += sum(1 for i in valid for _ in valid if i in anchors)
        applied += sum(1 for i in valid for j in valid if i in anchors or j in anchors)  # rows of M h
    hidden = tiny.L * tiny.B * tiny.T * tiny.D * 2
    forward, backward = costs(tiny, 2, "forward+backward")
    assert costs(tiny, 2, "forward") == [forward]
    assert forward == Cost(hidden, 2 * tiny.D * tiny.L * scored)
    assert backward == Cost(2 * hidden, 2 * tiny.D * tiny.L * (scored + applied))


def test_kernels_share_the_cost_of_the_passes():
    """The long path's backward makes the scores again, and reads the hidden states once more for that."""
    forward, backward = costs(TINY[0], 2, "forward+backward")
    assert kernel_cost("short_forward", TINY[0], 2) == kernel_cost("mi_scores", TINY[0], 2) == forward
    assert kernel_cost("short_backward", TINY[0], 2) == backward
    weights, gradient = (kernel_cost(f"mi_{name}", TINY[0], 2) for name in ("weights", "gradient"))
    assert weights.flops + gradient.flops == backward.flops
    assert gradient.bytes == backward.bytes
    assert kernel_cost("finalize", TINY[0], 2) is None


def test_the_slower_of_the_two_is_the_floor():
    rates = Rates(bytes_per_second=10.0, flops_per_second=100.0)
    assert Cost(bytes=50, flops=100).seconds(rates) == 5
    assert Cost(bytes=50, flops=900).seconds(rates) == 9
