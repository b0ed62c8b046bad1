"""The tap where autograd runs the backward on a thread of its own, and with layers on two devices."""

from __future__ import annotations

import pytest
import torch

import carma_kernels as ck

pytest.importorskip("transformers")
hooks = pytest.importorskip("accelerate.hooks")

from carma_kernels.integrations.transformers import HiddenStateTap  # noqa: E402
from tests.integration.tap.models import SPANS, batch, blocks_of, build, distance, gradients  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("users_defaults"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_pass_throughs_gradients(backend: str, checkpointed: bool) -> None:
    grads = []
    for pass_through in (True, False):
        model = build().cuda()
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None)  # its name in newer transformers
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        tap = HiddenStateTap(model, pass_through=pass_through)
        task = model(**{name: value.cuda() for name, value in batch().items()}, use_cache=False).loss
        carma = tap.carma_loss(SPANS.to("cuda"), backend=backend)
        ck.total_loss(task, carma.loss, 0.5).backward()
        grads.append(gradients(model))
    assert distance(*grads) < 1e-5


def test_fp16_with_a_gradient_scaler() -> None:
    model = build().cuda()
    tap = HiddenStateTap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    with torch.autocast("cuda", torch.float16):
        task = model(**{name: value.cuda() for name, value in batch().items()}).loss
        loss = ck.total_loss(task, tap.carma_loss(SPANS.to("cuda")).loss, 0.5)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_layers_on_two_devices() -> None:
    """As `device_map=` leaves them: one error with the way out, which gives every block its gradient."""
    model = build()
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": 0}
    device_map |= {"model.layers.1": 0, "model.layers.2": 0, "model.norm": 0, "lm_head": 0}
    for name, device in device_map.items():
        hooks.add_hook_to_module(model.get_submodule(name).to(device), hooks.AlignDevicesHook(device))
    tap = HiddenStateTap(model)
    model(input_ids=batch()["input_ids"])
    with pytest.raises(ValueError, match=r"hidden_states\[1\] is on cuda:0.*on cpu.*\.to\('cpu'\)"):
        tap.carma_loss(SPANS)
    ck.carma_loss([states.cuda() for states in tap.hidden_states], SPANS.to("cuda")).loss.backward()
    assert all(p.grad is not None for block in blocks_of(model)[:2] for p in block.parameters())
