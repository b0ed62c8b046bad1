"""A model within a wrapper, set before the tap or after it; adapters; frozen parts; virtual tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import carma_kernels as ck
from carma_kernels.integrations.transformers import HiddenStateTap
from tests.integration.tap.models import LAYERS, SPANS, VALID, batch, blocks_of, build, distance, gradients

# what peft still calls
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(model: nn.Module, tap: HiddenStateTap) -> None:
    task = model(**batch()).loss
    assert len(tap.hidden_states) == LAYERS
    ck.total_loss(task, tap.carma_loss(SPANS).loss, 0.5).backward()


def plain() -> dict[str, Tensor]:
    model = build()
    step(model, HiddenStateTap(model, pass_through=False))
    return gradients(model)


@pytest.mark.parametrize("tapped", ["the wrapper", "the model, before", "the model, after"])
def test_ddp(one_process: None, tapped: str) -> None:
    model = build()
    tap = HiddenStateTap(model) if tapped.endswith("before") else None
    wrapper = nn.parallel.DistributedDataParallel(model)
    tap = tap or HiddenStateTap(wrapper if tapped == "the wrapper" else model)
    for _ in range(2):
        wrapper.zero_grad()
        step(wrapper, tap)
    assert distance(gradients(model), plain()) < 1e-5


@pytest.mark.parametrize("tapped", ["before", "after"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_fsdp2(one_process: None, tapped: str, checkpointed: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build()
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    tap = HiddenStateTap(model) if tapped == "before" else None
    mesh = init_device_mesh("cpu", (1,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(model, tap or HiddenStateTap(model))
    found = {name: grad.full_tensor() for name, grad in gradients(model).items()}
    assert distance(found, plain()) < 1e-5


def lora(model: nn.Module, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_lora(use_reentrant: bool | None) -> None:
    """Only the adapters learn, and CARMA's gradient reaches every one."""
    grads = []
    for pass_through, checkpointed in ((True, use_reentrant), (False, None)):
        model = lora(build().double())
        if checkpointed is not None:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": checkpointed})
            model.enable_input_require_grads()
        tap = HiddenStateTap(model, pass_through=pass_through)
        model(**batch(), use_cache=False)
        tap.carma_loss(SPANS).loss.backward()
        grads.append(gradients(model))
        assert all("lora" in name for name in grads[-1])
        assert len(grads[-1]) == LAYERS * 4
    assert distance(*grads) < 1e-13


def test_lora_on_the_last_block() -> None:
    """What comes before needs no gradient, and the losses of those layers have none to give."""
    model = lora(build(), layers_to_transform=[LAYERS - 1])
    tap = HiddenStateTap(model)
    step(model, tap)
    assert len(gradients(model)) == 4
    assert all(grad.abs().max() > 0 for grad in gradients(model).values())


@pytest.mark.parametrize("kind", ["prompt", "p", "prefix"])
def test_virtual_tokens(kind: str) -> None:
    """They are no tokens of the batch: the loss is that of the others, wherever they lie."""
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    config = {
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "p": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }[kind]
    base = build().double()
    model = get_peft_model(base, config).double()
    raw: list[Tensor] = []
    blocks_of(base)[-1].register_forward_hook(lambda _block, _inputs, output: raw.append(output))
    prefix = 0 if kind == "prefix" else 4
    grads = []
    for pass_through in (True, False):
        model.zero_grad()
        with HiddenStateTap(model, pass_through=pass_through) as tap:
            assert tap.num_virtual_tokens == prefix
            task = model(**batch()).loss
            states = tap.hidden_states
            assert all(layer.shape[:2] == VALID.shape for layer in states)
            assert raw[-1].shape[1] == prefix + VALID.shape[1]
            assert torch.equal(states[-1], raw[-1][:, prefix:])
            ck.total_loss(task, tap.carma_loss(SPANS, mask=VALID).loss, 0.5).backward()
        grads.append(gradients(model))
    assert distance(*grads) < 1e-13
    assert distance(grads[0], task_only(model)) > 1e-3


def task_only(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    (0.5 * model(**batch()).loss).backward()
    return gradients(model)


def test_no_virtual_tokens_without_peft() -> None:
    assert HiddenStateTap(build()).num_virtual_tokens == 0


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_model(fresh_compiler: None, in_place: bool) -> None:
    """Hooks set before the first step are compiled in, also on the inner model; `remove()` takes them out again."""
    model = build()
    if in_place:
        model.compile(backend="eager")
        compiled: Any = model
    else:
        compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tap = HiddenStateTap(compiled)
    for _ in range(2):
        model.zero_grad()
        step(compiled, tap)
    assert distance(gradients(model), plain()) < 1e-5
    tap.remove()
    compiled(**batch())
    assert all(capture.states is None for capture in tap._captures)


# torch hides it where it looks at a tensor's gradient itself, but for a filter that makes it an error
torch_looks_at_gradients = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@torch_looks_at_gradients
@pytest.mark.parametrize("fullgraph", [False, True])
def test_blocks_compiled_one_by_one(fresh_compiler: None, fullgraph: bool) -> None:
    """`block.compile()` takes a block's hooks in, while the hook on the model around it stays as it is."""
    model = build()
    for block in blocks_of(model):
        block.compile(backend="aot_eager", fullgraph=fullgraph)
    tap = HiddenStateTap(model)
    for _ in range(2):
        model.zero_grad()
        step(model, tap)
    assert distance(gradients(model), plain()) < 1e-5


@torch_looks_at_gradients
def test_blocks_compiled_one_by_one_share_their_code(fresh_compiler: None) -> None:
    """The tap has no block compiled again that is like another: of so many, torch would give up."""
    blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(torch._dynamo.config.recompile_limit + 2))
    for block in blocks:
        block.compile(backend="eager", fullgraph=True)
    model = nn.Sequential(*blocks)
    tap = HiddenStateTap(model, blocks=blocks)
    torch._dynamo.utils.counters.clear()
    model(torch.randn(*VALID.shape, 4))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the first block's input needs no gradient
    assert len(tap.hidden_states) == len(blocks)


@pytest.mark.parametrize("in_place", [False, True])
def test_tapped_too_late(fresh_compiler: None, in_place: bool) -> None:
    model = build()
    if in_place:
        model.compile(backend="eager")
        compiled: Any = model
    else:
        compiled = torch.compile(model, backend="eager")
    compiled(**batch())
    with pytest.warns(UserWarning, match="already run compiled.*torch.compiler.reset"):
        tap = HiddenStateTap(compiled)
    compiled(**batch())
    with pytest.raises(RuntimeError, match=r"torch.compiler.reset"):
        _ = tap.hidden_states
    torch.compiler.reset()
    compiled(**batch())
    assert len(tap.hidden_states) == LAYERS
