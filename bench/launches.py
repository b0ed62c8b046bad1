"""The launches of a call, to be made again, and what the kernels need as they were loaded."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from carma_kernels import _runtime


class Launch(NamedTuple):
    """A kernel's launch, to be repeated."""

    launch: Callable[..., Any]
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def __call__(self) -> Any:
        return self.launch(self.kernel, self.grid, *self.args, **self.constants)

    @property
    def name(self) -> str:
        """As in the launch table, if it is there."""
        return kernel_name(self.kernel)

    def with_pieces(self, pieces: int) -> Launch:
        """With so many programs for the columns of a row, of a kernel that has a parameter for that."""
        at = self.kernel.arg_names.index("pieces")
        programs, *rest = self.grid
        args = (*self.args[:at], pieces, *self.args[at + 1 :])
        return self._replace(grid=(programs // self.args[at] * pieces, *rest), args=args)


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
    names: Container[str] | None = None, change: Callable[[Launch], Launch] = lambda made: made
) -> Iterator[list[Launch]]:
    """The launches within of these kernels, all by default, each as `change` has it."""
    launches: list[Launch] = []
    launch_kernel = _runtime.launch

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
        made = Launch(launch_kernel, kernel, grid, args, constants)
        if names is None or made.name in names:
            made = change(made)
            launches.append(made)
        return made()

    with patch.object(_runtime, "launch", record):
        yield launches
