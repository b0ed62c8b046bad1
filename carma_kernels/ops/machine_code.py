"""What a compiled kernel needs and uses, read from its assembly, and the one fault of Triton's pipeliner.

Triton's `tl.dot` in a loop reads its tiles from shared memory, where the next ones are copied meanwhile. On sm_90 it is
left unfinished while the loop goes on, so a tile wants one buffer more than there are copies ahead; a tile with another
use besides the product does not get it, and is overwritten while the tensor cores read it (triton-lang/triton#6691).
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

_KEPT = f"resources-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]}.json"
"""Where, in Triton's cache, this version of the file keeps what it has found: disassembly takes as long as the rest."""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs, and which instructions it uses."""

    registers: int
    shared_memory: int
    spilled: int  # bytes
    matrix_instructions: int
    wide_loads: int  # of 16 bytes, from global memory
    multiplies_tiles: bool
    overwritten_tiles: int = 0  # while a product reads them: see `overwritten_tiles`


def resources(compiled: Any) -> Resources:
    """Of what Triton's compiler returns; kept in Triton's cache."""
    cache = get_cache_manager(compiled.hash)
    kept = cache.get_file(_KEPT)
    if kept is not None:
        return Resources(**json.loads(Path(kept).read_text()))
    found = _of_amd(compiled) if compiled.metadata.target.backend == "hip" else _of_nvidia(compiled)
    cache.put(json.dumps(asdict(found)), _KEPT, binary=False)
    return found


def _of_nvidia(compiled: Any) -> Resources:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin)
        sass = _output(tools / "nvdisasm", "--print-code", cubin)
    loads_and_stores_of_spills = re.findall(r"\b(?:LDL|STL)\b", sass)
    stack = int(re.findall(r"STACK:(\d+)", usage)[-1])
    return Resources(
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        shared_memory=compiled.metadata.shared,
        spilled=max(stack, len(loads_and_stores_of_spills)),
        matrix_instructions=len(re.findall(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b", sass)),
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.\S*128\b|\bUTMALDG|\bUBLKCP", sass)),
        multiplies_tiles="tt.dot" in compiled.asm["ttir"],
        overwritten_tiles=len(overwritten_tiles(compiled.asm["ttgir"])),
    )


def _of_amd(compiled: Any) -> Resources:
    assembly = compiled.asm["amdgcn"]

    def total(name: str) -> int:
        return sum(int(number) for number in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    return Resources(
        registers=total("vgpr_count"),
        shared_memory=compiled.metadata.shared,
        # scalar registers are spilled to lanes of vector registers, not to memory
        spilled=max(total("private_segment_fixed_size"), 4 * total("vgpr_spill_count")),
        matrix_instructions=len(re.findall(r"\bv_s?mfma", assembly)),
        wide_loads=len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly)),
        multiplies_tiles="tt.dot" in compiled.asm["ttir"],
    )


def _output(*command: Any) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


_ALLOCATION = re.compile(r"(%[\w#]+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x")
_VIEW = re.compile(r"(%[\w#]+) = ttg\.memdesc_\w+ (%[\w#]+)")
_COPY = re.compile(r"ttg\.async_copy_global_to_local %[\w#]+, (%[\w#]+)")
_PRODUCT = re.compile(r"ttng\.warp_group_dot (%[\w#]+), (%[\w#]+),.*isAsync = true")
_WAIT = re.compile(r"ttng\.warp_group_dot_wait .*pendings = (\d+)")


def overwritten_tiles(ttgir: str) -> list[str]:
    """The tiles of a kernel that a copy overwrites while a product of an earlier step may still read them.

    With n buffers and copies made d steps ahead, the copy that step i starts goes where step `i + d - n` has read. That
    is too early if that step's product is among the last p, which the wait before leaves pending.

    Args:
        ttgir: the kernel in Triton's GPU IR.
    """
    lines = ttgir.splitlines()
    buffers = {found[1]: int(found[2]) for line in lines if (found := _ALLOCATION.search(line))}
    owner = {tile: tile for tile in buffers}  # of each view of a tile
    for line in lines:
        if (found := _VIEW.search(line)) and found[2] in owner:
            owner[found[1]] = owner[found[2]]
    copies = [(at, owner[found[1]]) for at, line in enumerate(lines) if (found := _COPY.search(line))]
    overwritten = []
    for start, stop in _loops(lines):
        products = [(at, found) for at in range(start, stop) if (found := _PRODUCT.search(lines[at]))]
        for tile in dict.fromkeys(owner[name] for _, found in products for name in found.groups() if name in owner):
            ahead = sum(copied == tile and at < start for at, copied in copies)
            product = max(at for at, found in products if tile in (owner.get(found[1]), owner.get(found[2])))
            for copy in (at for at, copied in copies if copied == tile and start < at < stop):
                pending = _pending(lines[product:stop], copy - product)
                earlier = int(copy < product)  # the product of this very step comes after the copy
                if any((ahead + step) % buffers[tile] == 0 for step in range(earlier, earlier + pending)):
                    overwritten.append(tile)
    return overwritten


def _pending(after_product: list[str], copy: int) -> int:
    """How many products may be unfinished when the copy begins, in a loop whose lines from the product on are given."""
    waits = [(at, int(found[1])) for at, line in enumerate(after_product) if (found := _WAIT.search(line))]
    before = [pending for at, pending in waits if copy < 0 or at < copy]
    return min(before, default=len(after_product))


def _loops(lines: list[str]) -> Iterator[tuple[int, int]]:
    """First and last line of each loop."""
    for start, line in enumerate(lines):
        if "scf.for " in line:
            end = " " * (len(line) - len(line.lstrip())) + "}"
            yield start, next(at for at in range(start + 1, len(lines)) if lines[at].startswith(end))
