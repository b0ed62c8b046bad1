"""No tile is overwritten while the tensor cores of an H100 read it (triton-lang/triton#6691)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.cli.processes import ROOT

pytest.importorskip("triton")

LOOP = """\
    %tile = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x64x64xbf16, #shared, #smem, mutable> loc(#loc1)
    %first = ttg.memdesc_index %tile[%c0_i32] : !ttg.memdesc<{buffers}x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %1 = ttg.async_copy_global_to_local %p, %first mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>
    %second = ttg.memdesc_index %tile[%c1_i32] : !ttg.memdesc<{buffers}x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %2 = ttg.async_copy_global_to_local %q, %second mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>
    %3:2 = scf.for %i = %c0 to %D step %c64 iter_args(%sum = %zero, %at = %c1_i32) -> (tensor<64x64xf32>, i32)  : i32 {{
      %read = ttg.memdesc_index %tile[%at] : !ttg.memdesc<{buffers}x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
      %turned = ttg.memdesc_trans %read {{order = array<i32: 1, 0>}} : !ttg.memdesc<64x64xbf16>
      %gram = ttng.warp_group_dot %read, %turned, %sum {{isAsync = {asynchronous}}} : !ttg.memdesc<64x64xbf16>
{wait}
      %next = ttg.memdesc_index %tile[%to] : !ttg.memdesc<{buffers}x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
      %4 = ttg.async_copy_global_to_local %r, %next mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>
      scf.yield %gram, %to : tensor<64x64xf32>, i32
    }} {{tt.num_stages = 3 : i32}}
"""
WAIT = "      %w:2 = ttng.warp_group_dot_wait %gram, %read {{pendings = {} : i32}} : tensor<64x64xf32>"


@pytest.mark.parametrize(
    ("buffers", "wait", "asynchronous", "overwritten"),
    [
        (2, WAIT.format("1"), "true", True),  # as many buffers as copies ahead, and a product left unfinished
        (3, WAIT.format("1"), "true", False),
        (3, WAIT.format("2"), "true", True),  # two of them
        (4, WAIT.format("2"), "true", False),
        (2, WAIT.format("0"), "true", False),
        (2, "", "true", True),
        (3, "", "true", True),  # sooner or later
        (2, "", "false", False),
    ],
)
def test_how_it_is_seen(buffers: int, wait: str, asynchronous: str, overwritten: bool) -> None:
    from carma_kernels.ops.machine_code import overwritten_tiles

    ttgir = LOOP.format(buffers=buffers, wait=wait, asynchronous=asynchronous)
    assert overwritten_tiles(ttgir) == ["%tile"] * overwritten


def test_every_launch_configuration() -> None:
    """The first is a kernel that Triton is known to get wrong; should it no longer, this says so."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.pipelines"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    wrong, *ours = map(json.loads, result.stdout.splitlines())
    assert wrong["kernel"] == "two_uses"
    assert len(wrong["overwritten"]) == 1
    pipelined = {row["kernel"] for row in ours if row["pipelined products"]}
    assert pipelined >= {"short_forward", "short_backward", "mi_scores", "mi_weights", "mi_gradient"}
    assert [row for row in ours if row["overwritten"]] == []
