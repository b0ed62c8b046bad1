"""Where in a model its blocks are, whatever it is wrapped in, and whether it has run compiled."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn


class Blocks(NamedTuple):
    """The blocks of a model, first to last, and the module whose forward runs them all."""

    owner: nn.Module
    modules: list[nn.Module]


def find_blocks(model: nn.Module) -> Blocks:
    """The blocks of a language model.

    They are the one `nn.ModuleList`, outside of any other, that is as long as the config of the model it lies in says
    (`num_hidden_layers`; `n_layers` in TransformerLens). A list in a model without a config may have any length.
    Wrappers (DDP, FSDP, torch.compile, PEFT) are modules with the model inside, so nothing is unwrapped.

    Raises:
        TypeError: `model` is no module.
        ValueError: no such list, or several.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    lists = dict(_outermost_lists(model))
    found = {
        path: modules for path, modules in lists.items() if len(modules) and _depth(model, path) in (None, len(modules))
    }
    if len(found) == 1:
        return given_blocks(model, list(*found.values()))
    way_out = "Pass them: HiddenStateTap(model, blocks=model.get_submodule('path.of.the.blocks'))."
    if found:
        raise ValueError(
            f"{type(model).__name__} has several lists of blocks, {_listing(found)}; only one can be tapped. {way_out}"
        )
    seen = f"it has {_listing(lists)}" if lists else "it has no torch.nn.ModuleList at all"
    raise ValueError(
        f"{type(model).__name__} has no torch.nn.ModuleList whose length is the num_hidden_layers (n_layers) of its "
        f"config; {seen}. {way_out}"
    )


def given_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> Blocks:
    """The blocks that the user names.

    Raises:
        TypeError: not modules.
        ValueError: none, one twice, or one that is not a part of `model`.
    """
    modules = list(blocks)
    if not all(isinstance(module, nn.Module) for module in modules):
        raise TypeError("blocks must be a ModuleList or a list of torch.nn.Module, first block first.")
    wanted = {id(module) for module in modules}
    if not modules or len(wanted) < len(modules):
        raise ValueError(
            f"blocks must be one module or more, each once, got {len(modules)} with {len(wanted)} different."
        )
    owners = [
        module
        for module in model.modules()
        # a ModuleList is never called
        if not isinstance(module, nn.ModuleList) and wanted <= {id(inner) for inner in module.modules()} - {id(module)}
    ]
    if not owners:
        raise ValueError(f"blocks must be parts of model, a {type(model).__name__}, and at least one is not.")
    return Blocks(owners[-1], modules)  # a parent comes before its children


def ran_compiled(model: nn.Module) -> bool:
    """Whether a compiled model has run: torch.compile takes no notice of hooks that are set afterwards."""
    return any(map(_has_compiled_code, model.modules()))


def _outermost_lists(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            yield inner, child
        else:
            yield from _outermost_lists(child, inner)


def _depth(model: nn.Module, path: str) -> int | None:
    """How many blocks the nearest config around `path` announces."""
    depth: int | None = None
    module = model
    for name in ("", *path.split(".")):
        module = getattr(module, name) if name else module
        config: Any = vars(module).get("config", vars(module).get("cfg"))
        for attribute in ("num_hidden_layers", "n_layers"):
            announced = getattr(config, attribute, None)
            depth = announced if isinstance(announced, int) else depth
    return depth


def _listing(lists: dict[str, nn.ModuleList]) -> str:
    return ", ".join(f"{path} ({len(modules)})" for path, modules in lists.items())


def _has_compiled_code(module: nn.Module) -> bool:
    """Compiled, and called since."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    entries = getattr(sys.modules.get("torch._C._dynamo.eval_frame"), "_debug_get_cache_entry_list", None)
    if dynamo is None or entries is None:  # nothing has been compiled in this process
        return False
    if isinstance(module, dynamo.OptimizedModule):
        module = module._orig_mod
    elif getattr(module, "_compiled_call_impl", None) is None:
        return False
    function: Any = getattr(module.forward, "__func__", module.forward)
    while function is not None:
        if (code := getattr(function, "__code__", None)) is not None and entries(code):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
