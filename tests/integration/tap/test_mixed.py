"""Mixed environments: half precision, a compiled training step, layers on several devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from torch import Tensor

import carma_kernels as ck
from carma_kernels.integrations.transformers import HiddenStateTap
from tests.integration.tap.models import LAYERS, SPANS, VALID, batch, blocks_of, build, distance, gradients, hand_placed


def loss_of(model: Any, tap: HiddenStateTap) -> Tensor:
    task = model(**batch()).loss
    return ck.total_loss(task.float(), tap.carma_loss(SPANS).loss, 0.5)


@pytest.fixture(scope="module")
def exact() -> dict[str, Tensor]:
    """The gradients in fp32."""
    model = build()
    tap = HiddenStateTap(model, pass_through=False)
    (0.5 * model(**batch()).loss).backward()
    task = gradients(model)
    model.zero_grad()
    loss_of(model, tap).backward()
    assert distance(task, gradients(model)) > 0.5, "a test with less tolerance sees whether CARMA's part is there"
    return gradients(model)


@pytest.mark.parametrize("pass_through", [True, False])
def test_fp16_with_a_gradient_scaler(pass_through: bool, exact: dict[str, Tensor]) -> None:
    """A scale that is too large is found and halved; another reaches every layer's gradient and leaves it again."""
    model = build()
    tap = HiddenStateTap(model, pass_through=pass_through)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    before = blocks_of(model)[0].mlp.up_proj.weight.clone()
    for _ in range(12):
        optimizer.zero_grad()
        scale = scaler.get_scale()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, tap)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() == scale:
            break
    assert 2.0**8 <= scale < 2.0**20
    assert not torch.equal(blocks_of(model)[0].mlp.up_proj.weight, before)
    assert distance(gradients(model), exact) < 0.02


@pytest.mark.parametrize("pass_through", [True, False])
def test_bf16_autocast(pass_through: bool, exact: dict[str, Tensor]) -> None:
    model = build()
    tap = HiddenStateTap(model, pass_through=pass_through)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, tap).backward()
    assert distance(gradients(model), exact) < 0.1


def test_accelerate(exact: dict[str, Tensor]) -> None:
    """It casts what the model returns to fp32, hidden states included; the tap has what the blocks returned."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(build().bfloat16())
    tap = HiddenStateTap(model)
    seen = hand_placed(blocks_of(accelerator.unwrap_model(model)))
    output = model(**batch(), output_hidden_states=True)
    assert {states.dtype for states in output.hidden_states} == {torch.float32}
    assert {states.dtype for states in tap.hidden_states} == {torch.bfloat16}
    assert all(torch.equal(states, output) for states, output in zip(tap.hidden_states, seen, strict=True))
    accelerator.backward(ck.total_loss(output.loss, tap.carma_loss(SPANS).loss, 0.5))
    assert distance({name: grad.float() for name, grad in gradients(model).items()}, exact) < 0.2


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_training_step(
    fresh_compiler: None, backend: str, checkpointed: bool, exact: dict[str, Tensor]
) -> None:
    """The model, the tap's hooks and both losses in one graph; a second batch of the same shape needs no other."""
    model = build()
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    tap = HiddenStateTap(model)
    graphs: list[Any] = []
    fullgraph = not checkpointed  # where transformers warns, dynamo breaks the graph

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    @torch.compile(backend=count, fullgraph=fullgraph)
    def loss(inputs: dict[str, Tensor]) -> Tensor:
        task = model(**inputs, use_cache=False).loss
        return ck.total_loss(task, tap.carma_loss(SPANS).loss, 0.5)

    first: int | None = None
    for _ in range(3):
        model.zero_grad()
        loss(batch()).backward()
        assert distance(gradients(model), exact) < 1e-5
        assert first in (None, len(graphs)), "recompiled"
        first = len(graphs)
    assert graphs
    if fullgraph:
        assert len(graphs) == 1


def test_layers_on_several_devices() -> None:
    """One error, which names the layer, both devices and the ways out, one of which is taken here."""
    model = build()
    blocks_of(model)[2].register_forward_hook(lambda _block, _inputs, output: output.to("meta"))
    tap = HiddenStateTap(model.model)
    model.model.norm.to("meta")
    model.model(batch()["input_ids"])
    for loss in (tap.carma_loss, lambda spans: ck.carma_loss(tap.hidden_states, spans)):
        with pytest.raises(ValueError, match=r"hidden_states\[2\] is on meta.*on cpu.*\.to\('cpu'\)"):
            loss(SPANS)
    together = [states.to("meta") for states in tap.hidden_states]
    assert ck.carma_loss(together, SPANS.to("meta")).loss.device.type == "meta"


def test_dispatched_model(exact: dict[str, Tensor]) -> None:
    """As `device_map=` does it: accelerate's hooks replace each block's forward."""
    model = build()
    names = ["model.embed_tokens", *(f"model.layers.{layer}" for layer in range(LAYERS)), "model.norm", "lm_head"]
    model = dispatch_model(
        model, {**dict.fromkeys(names, "cpu"), "model.rotary_emb": "cpu"}, main_device="cpu", force_hooks=True
    )
    assert all(hasattr(block, "_hf_hook") for block in blocks_of(model))
    loss_of(model, HiddenStateTap(model)).backward()
    assert distance(gradients(model), exact) < 1e-5


def test_padding_does_not_matter() -> None:
    """Nor does what the model makes of it."""
    model = build()
    tap = HiddenStateTap(model)
    inputs = batch()
    model(**inputs)
    expected = tap.carma_loss(SPANS, mask=VALID).loss
    inputs["input_ids"] = inputs["input_ids"].where(VALID, 7)
    model(**inputs)
    assert torch.equal(tap.carma_loss(SPANS, mask=VALID).loss, expected)
