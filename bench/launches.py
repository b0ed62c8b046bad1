"""The launches of a call, to be made again, and what the kernels need as they were loaded."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from carma_kernels import _runtime

Grid = tuple[int, ...]


class Launch(NamedTuple):
    """A kernel's launch, to be repeated."""

    launch: Callable[..., Any]
    kernel: Any
    grid: Grid
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def __call__(self) -> Any:
        return self.launch(self.kernel, self.grid, *self.args, **self.constants)

    @property
    def name(self) -> str:
        """As in the launch table, if it is there."""
        return kernel_name(self.kernel)


class Resources(NamedTuple):
    """What a kernel needs, as loaded; None where there is none, as in Triton's interpreter."""

    registers: int | None
    spills: int | None
    shared_memory: int | None

    @classmethod
    def of(cls, compiled: Any) -> Resources:
        """Of what a launch returns."""
        metadata = getattr(compiled, "metadata", None)
        return cls(
            getattr(compiled, "n_regs", None), getattr(compiled, "n_spills", None), getattr(metadata, "shared", None)
        )


def kernel_name(kernel: Any) -> str:
    """Without what every kernel's name has."""
    return str(getattr(kernel, "fn", kernel).__name__).strip("_").removesuffix("_kernel")


@contextmanager
def recorded(
    names: Container[str] | None = None, change: Callable[[Grid], Grid] = lambda grid: grid
) -> Iterator[list[Launch]]:
    """The launches within of these kernels, all by default, each on the grid that `change` makes of its own."""
    launches: list[Launch] = []
    launch_kernel = _runtime.launch

    def record(kernel: Any, grid: Grid, *args: Any, **constants: Any) -> Any:
        made = Launch(launch_kernel, kernel, grid, args, constants)
        if names is None or made.name in names:
            made = made._replace(grid=change(grid))
            launches.append(made)
        return made()

    with patch.object(_runtime, "launch", record):
        yield launches
