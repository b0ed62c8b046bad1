"""Print `docs/compile_table.md`, made of the tables in `docs/compile_table/`."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent / "compile_table"
Row = dict[str, str]


def tables() -> dict[str, list[Row]]:
    """The rows of each version of Triton."""
    files = sorted(FOLDER.glob("triton-*.tsv"))
    return {
        file.stem.removeprefix("triton-"): list(
            csv.DictReader(file.read_text().splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        )
        for file in files
    }


def page(found: dict[str, list[Row]]) -> Iterator[str]:
    """Its lines: of each kernel a table, with a column for each target."""
    rows = [row for table in found.values() for row in table]
    targets = sorted({row["target"] for row in rows}, key=lambda name: (-ord(name[0]), int(re.sub(r"\D", "", name))))
    yield from INTRODUCTION.format(versions=", ".join(found), targets=", ".join(targets)).splitlines()
    yield ""
    for version, table in found.items():
        faults = [row for row in table if row["faults"]]
        yield f"- Triton {version}: {len(table)} compilations, {len(faults)} faults."
        yield from (f"  - `{row['kernel']}`, {row['target']}, {row['dtype']}: {row['faults']}" for row in faults)
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        yield from ("", f"## {kernel}", "", "| dtype | variant | blocks | " + " | ".join(targets) + " |")
        yield "| --- | --- | --- |" + " --- |" * len(targets)
        cells: dict[tuple[str, str, str], dict[tuple[str, str], str]] = {}
        for version, table in found.items():
            for row in table:
                if row["kernel"] == kernel:
                    key = (row["dtype"], *variant_and_blocks(row["constants"]))
                    cells.setdefault(key, {})[row["target"], version] = cell(row)
        for key, by_target in cells.items():
            yield "| " + " | ".join((*key, *(joined(by_target, target, list(found)) for target in targets))) + " |"


INTRODUCTION = """\
# What the kernels compile to

Every kernel that a call with any options launches, in every configuration that
[the launch table](../carma_kernels/kernels/launch.py) can pick and in every dtype, without a GPU, for {targets},
by Triton {versions}.

- [compile_table/](compile_table) has a table for each version:
  `python -m carma_kernels.ops.compile > docs/compile_table/triton-VERSION.tsv`
- this page is made of them: `python docs/compile_table.py > docs/compile_table.md`

A cell reads "registers a thread / KiB of shared memory a program" for each version in turn, once if they agree; –
where a version is given other blocks. A spill is a fault, except where rows may lie at any address (`ALIGNMENT` below
16: a width that 16 does not divide, say) and are loaded element by element. So is a tile that is overwritten while the
tensor cores may be reading it, and a product of halves without the matrix units or without loads of 16 bytes."""


def variant_and_blocks(constants: str) -> tuple[str, str]:
    """The constants in two: what is computed, with what does not hold left out; and how it is cut up."""
    variant, blocks = [], []
    for name, value in (constant.split("=") for constant in constants.split(", ") if constant):
        if name.startswith(("BLOCK", "NUM_", "PIECES", "num_", "maxnreg")):
            blocks.append(f"{name}={value}")
        elif value != "False":
            variant.append(name if value == "True" else f"{name}={value}")
    return " ".join(variant), " ".join(blocks)


def cell(row: Row) -> str:
    """What a kernel needs."""
    if not row["registers"]:
        return "**does not compile**"
    spilled = f" **spills {row['spilled']}**" if row["spilled"] != "0" else ""
    return f"{row['registers']} / {row['shared KiB']}{spilled}"


def joined(cells: dict[tuple[str, str], str], target: str, versions: list[str]) -> str:
    """The versions' cells of a target."""
    found = [cells.get((target, version), "–") for version in versions]
    if set(found) == {"–"}:
        return ""
    return found[0] if len(set(found)) == 1 else ", ".join(found)


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in page(tables()))
