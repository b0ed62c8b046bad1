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


def find_blocks(model: nn.Module, argument: str = "blocks") -> Blocks:
    """The blocks of a language model.

    They are the one `nn.ModuleList`, outside of any other, that is as long as the config of the model it lies in says
    (`num_hidden_layers`; `n_layers` in TransformerLens). A list in a model without a config may have any length, and so
    may an encoder's and a decoder's. In a model of text and of something else, the text's.
    Wrappers (DDP, FSDP, torch.compile, PEFT) are modules with the model inside, so nothing is unwrapped.

    Args:
        model: as it is or wrapped.
        argument: what the caller's user names the blocks with where they are not found.

    Raises:
        TypeError: `model` is no module.
        ValueError: no such list, or several; or blocks that run several times in a forward.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    lists = dict(_outermost_lists(model))
    of_text = {path: modules for path, modules in lists.items() if _is_of_text(_configs(model, path))}
    found = {
        path: modules
        for path, modules in (of_text or lists).items()
        if len(modules) and _fits(len(modules), _configs(model, path))
    }
    if len(found) == 1:
        return given_blocks(model, list(*found.values()), argument)
    if found:
        ways_out = " or ".join(f"{argument}={path!r}" for path in found)
        raise ValueError(
            f"{type(model).__name__} has several lists of blocks, {_listing(found)}; only one can be tapped. Say "
            f"which: {ways_out}."
        )
    for path in lists:
        _refuse_shared(model, _configs(model, path))
    seen = f"it has {_listing(lists)}" if lists else "it has no torch.nn.ModuleList at all"
    raise ValueError(
        f"{type(model).__name__} has no torch.nn.ModuleList whose length is the num_hidden_layers (n_layers) of its "
        f"config; {seen}. Name one, {argument}='path.of.the.blocks', or pass the modules themselves, first block first."
    )


def given_blocks(model: nn.Module, blocks: str | Sequence[nn.Module], argument: str = "blocks") -> Blocks:
    """The blocks that the user names: by the path of their list, or the modules themselves.

    A path is one within `model`, or within the model that `model` wraps.

    Raises:
        TypeError: neither a path nor modules.
        ValueError: a path that leads nowhere or to no list; no modules, one twice, or one that is not a part of
            `model`; or blocks that run several times in a forward.
    """
    modules = _list_at(model, blocks, argument) if isinstance(blocks, str) else list(blocks)
    if not all(isinstance(module, nn.Module) for module in modules):
        raise TypeError(
            f"{argument} must be a ModuleList or a list of torch.nn.Module, first block first, or the path of a "
            "ModuleList."
        )
    wanted = {id(module) for module in modules}
    if not modules or len(wanted) < len(modules):
        raise ValueError(
            f"{argument} must be one module or more, each once, got {len(modules)} with {len(wanted)} different."
        )
    around = [
        module for module in model.modules() if wanted <= {id(inner) for inner in module.modules()} - {id(module)}
    ]
    if not around:
        raise ValueError(
            f"{argument} must be parts of model, a {type(model).__name__}, and at least one is not. Where models are "
            f"made anew (model_init), name the path: {argument}='path.of.the.blocks'."
        )
    _refuse_shared(model, [config for module in around if (config := _config_of(module)) is not None])
    # a parent comes before its children, and a ModuleList is never called
    owner = next(module for module in reversed(around) if not isinstance(module, nn.ModuleList))
    return Blocks(owner, modules)


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


def _list_at(model: nn.Module, path: str, argument: str) -> list[nn.Module]:
    """The modules of the list at `path`, which may leave out what wrappers put before it."""
    named = dict(model.named_modules())
    ends = [name for name in named if f".{name}".endswith(f".{path}")]
    if len(ends) > 1 and path not in named:
        raise ValueError(
            f"{argument}={path!r} is the end of several paths in {type(model).__name__}: {ends}. Name one."
        )
    module = named[path] if path in named else named[ends[0]] if ends else None
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        what = "is nothing" if module is None else f"is a {type(module).__name__}, no list of blocks,"
        lists = dict(_outermost_lists(model))
        raise ValueError(f"{argument}={path!r} {what} in {type(model).__name__}, whose lists are {_listing(lists)}.")
    return list(module)


def _config_of(module: nn.Module) -> Any:
    """Hugging Face's, or TransformerLens's; None without."""
    return vars(module).get("config", vars(module).get("cfg"))


def _configs(model: nn.Module, path: str) -> list[Any]:
    """Those of the modules around what is at `path`, outermost first."""
    *parents, _ = path.split(".")
    around = [model.get_submodule(".".join(parents[:depth])) for depth in range(len(parents) + 1)]
    return [config for module in around if (config := _config_of(module)) is not None]


def _fits(length: int, configs: Sequence[Any]) -> bool:
    """Whether a list of blocks may be so long: as the nearest config says that announces a number."""
    for config in reversed(configs):
        if getattr(config, "is_encoder_decoder", False):
            return True  # it has two lists, and announces the length of one
        announced = [getattr(config, name, None) for name in ("n_layers", "num_hidden_layers")]
        if depths := [depth for depth in announced if isinstance(depth, int)]:
            return length == depths[0]
    return True


def _is_of_text(configs: Sequence[Any]) -> bool:
    """Whether the nearest config is the text's, of a model with a config for each thing it reads."""
    for config in configs:
        # an encoder-decoder says this of its decoder, and either may be meant
        if not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
            continue
        try:
            text = config.get_text_config()
        except ValueError:  # it has several
            continue
        if text is not config and type(text) is type(configs[-1]):  # blocks may have a copy
            return True
    return False


def _refuse_shared(model: nn.Module, configs: Sequence[Any]) -> None:
    for config in configs:
        groups, depth = (getattr(config, name, None) for name in ("num_hidden_groups", "num_hidden_layers"))
        if isinstance(groups, int) and isinstance(depth, int) and groups < depth:
            raise ValueError(
                f"{type(model).__name__} is not supported: its {depth} layers are {groups} block(s), run again and "
                "again (ALBERT, num_hidden_groups), and a block that runs several times in a forward has no one output "
                "to tap. Compute ck.carma_loss of the model's output_hidden_states, less the first, instead."
            )


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
