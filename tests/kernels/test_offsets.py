"""No kernel makes an offset in int32 that could pass 2^31.

Read from the sources: what comes of `tl.program_id`, and numbers of tokens that a kernel loads, are int32. To add them
to an address is right; to multiply them by a size that is known only when the kernel runs is not, unless int64 takes
part by then: rows times D are more than 2^31 long before memory is full.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
import torch

from tests.architecture.sources import python_files

TOKENS = re.compile(r"(token|anchor|positive|negatives|other)_ptr")
MAKE_INT64 = {"pid64", "place_in_grid"}
SIZE = re.compile(r"[A-Z]+|num_\w+|stride\w*|\w+_stride")


class Narrow:
    """The int32 numbers of device functions, found by following assignments and calls."""

    def __init__(self, sources: list[str]) -> None:
        nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
        self.functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
        self.names: set[tuple[str, str]] = set()  # function, variable
        self.wide: set[tuple[str, str]] = set()  # those of int64
        self.returning: set[str] = set()
        before = -1
        while before != (before := len(self.names) + len(self.wide) + len(self.returning)):
            for name in self.functions:
                self._follow(name)

    def _follow(self, function: str) -> None:
        for node in ast.walk(self.functions[function]):
            if isinstance(node, ast.Assign):
                found = self.wide if self.is_wide(node.value, function) else self.names
                if found is self.wide or self.is_narrow(node.value, function):
                    targets = [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
                    found |= {(function, name) for name in targets}
            elif isinstance(node, ast.Return) and node.value is not None and self.is_narrow(node.value, function):
                self.returning.add(function)
            elif isinstance(node, ast.Call) and (callee := self.functions.get(called(node))) is not None:
                for parameter, argument in zip(callee.args.args, node.args, strict=False):
                    if self.is_narrow(argument, function):
                        self.names.add((callee.name, parameter.arg))

    def is_wide(self, node: ast.expr, function: str) -> bool:
        """Whether int64 takes part in the value."""
        if to_int32(node):
            return False
        if isinstance(node, ast.Name):
            return node.id in MAKE_INT64 or (function, node.id) in self.wide
        if isinstance(node, ast.Attribute) and node.attr == "int64":
            return True
        return any(self.is_wide(part, function) for part in ast.iter_child_nodes(node))

    def is_narrow(self, node: ast.expr, function: str) -> bool:
        """Whether the value is made of int32 numbers."""
        if isinstance(node, ast.Compare) or self.is_wide(node, function):
            return False
        if to_int32(node):
            return True
        if isinstance(node, ast.Name):
            return (function, node.id) in self.names
        if isinstance(node, ast.Call) and called(node) == "load":
            return any(isinstance(part, ast.Name) and TOKENS.fullmatch(part.id) for part in ast.walk(node.args[0]))
        if isinstance(node, ast.Call) and (called(node) == "program_id" or called(node) in self.functions):
            return called(node) == "program_id" or called(node) in self.returning
        return any(self.is_narrow(part, function) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr))

    def products(self) -> Iterator[tuple[str, str]]:
        """Function and product of an int32 number and a size of the run."""
        for name, function in self.functions.items():
            fixed = {a.arg for a in function.args.args if a.annotation and "constexpr" in ast.unparse(a.annotation)}
            for node in ast.walk(function):
                if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and not self.is_wide(node, name):
                    for number, size in ((node.left, node.right), (node.right, node.left)):
                        is_size = isinstance(size, ast.Name) and SIZE.fullmatch(size.id) and size.id not in fixed
                        if is_size and self.is_narrow(number, name):
                            yield name, ast.unparse(node)


def to_int32(node: ast.AST) -> bool:
    """Whether it is `x.to(tl.int32)`."""
    return isinstance(node, ast.Call) and called(node) == "to" and ast.unparse(node.args[0]) == "tl.int32"


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


BOUNDED = {
    # a row of at most 128
    "_short_forward_kernel": "row[:, None] * D",
    "_short_backward_kernel": "row[:, None] * D",
    # ops.similarity refuses sequences of more than 2^31 - 1 numbers
    "_load_piece": "token[:, None] * D",
    "_similarity_backward_kernel": "i[:, None] * D",
    # ops.mi gives a group's weights a workspace of as many at most
    "_mi_weights_kernel": "row[:, None] * COLUMNS",
    "_mi_gradient_kernel": "row[:, None] * COLUMNS",
}


def test_no_product_of_int32_numbers() -> None:
    kernels = [file.read_text() for file in python_files("carma_kernels/kernels") if file.name != "launch.py"]
    assert set(Narrow(kernels).products()) == set(BOUNDED.items())


def test_what_bounds_them() -> None:
    """The workspace of a batch whose layer takes 2^33 bytes; sequences of 2^31 numbers."""
    from carma_kernels._ranks import RankTable
    from carma_kernels._terms import Similarity
    from carma_kernels.ops.layers import LayerTable, ScaledSimilarity
    from carma_kernels.ops.mi import _Problem
    from carma_kernels.ops.similarity import pairwise_similarity

    hidden = torch.empty(1, dtype=torch.float16).expand(2**19, 1, 2**13)  # memory for one number
    one = torch.zeros(1, 1, dtype=torch.int32)
    ranks = RankTable(one.expand(1, 2**19), one, one, one, one.expand(1, 2**19), 1)
    problem = _Problem(LayerTable((hidden,)), ranks, ScaledSimilarity(True, torch.ones(()), None))
    for window in problem.windows(1, 128):
        assert len(window.anchors) * len(window.keys) < 2**31
    wide = torch.empty(1).expand(1, 1, 2**16, 2**15)
    with pytest.raises(ValueError, match=r"65536 tokens with 32768 numbers.*backend='torch'"):
        pairwise_similarity(wide, range(1), Similarity(True, 1.0), None, torch.float32)


HELPER = "def helper(x_ptr, row, N):\n    return tl.load(x_ptr + row * N)\n"
KERNEL = "def kernel(x_ptr, token_ptr, N, BLOCK: tl.constexpr):\n    "


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        ("tl.load(x_ptr + tl.program_id(0) * N)", "tl.load(x_ptr + pid64(0) * N)"),
        (
            "row = tl.program_id(0) * BLOCK\n    tl.load(x_ptr + row * N)",
            "row = pid64(0) * BLOCK\n    tl.load(x_ptr + row * N)",
        ),
        (
            "t = tl.load(token_ptr)\n    tl.load(x_ptr + t * N)",
            "t = tl.load(token_ptr)\n    tl.load(x_ptr + t.to(tl.int64) * N)",
        ),
        ("helper(x_ptr, tl.program_id(1), N)", "helper(x_ptr, pid64(1), N)"),
        (
            "at, _, _ = place_in_grid(N, 1)\n    row = at.to(tl.int32)\n    tl.load(x_ptr + row * N)",
            "row, at, _ = place_in_grid(N, 1)\n    tl.load(x_ptr + row.to(tl.int32) * BLOCK + at * N)",
        ),
    ],
)
def test_it_notices(narrow: str, wide: str) -> None:
    assert list(Narrow([HELPER + KERNEL + narrow]).products())
    assert not list(Narrow([HELPER + KERNEL + wide]).products())
