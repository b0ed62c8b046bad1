"""What lies on the right side of each check is taken: to refuse too much is as wrong as to miss something."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels import CarmaConfig, PairIndex, TokenSpans
from tests.validation.calls import FUNCTIONS, HIDDEN, PAIRS, SPANS, WITH_MASK, WITH_PAIRS, WITH_TEMPERATURE, B, T, call

pytestmark = pytest.mark.usefixtures("no_interpreter")

FORMS = {
    "tensor": HIDDEN,
    "list": list(HIDDEN),
    "tuple": tuple(HIDDEN),
    "one layer": [HIDDEN[0]],
    "one stacked layer": HIDDEN[:1],
    "fp64": HIDDEN.double(),
    "bf16": HIDDEN.bfloat16(),
    "fp16": HIDDEN.half(),
    "transposed": HIDDEN.transpose(1, 2).contiguous().transpose(1, 2),
    "layers of different strides": [HIDDEN[0], HIDDEN[1].transpose(0, 1).contiguous().transpose(0, 1)],
    "needing gradients in part": [HIDDEN[0], HIDDEN[1].clone().requires_grad_()],
}


def finite(output: object) -> bool:
    loss = output.loss if isinstance(output, ck.CarmaOutput) else output
    assert isinstance(loss, Tensor)
    return bool(loss.isfinite().all())


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_hidden_states(function: str, form: str):
    assert finite(call(function, FORMS[form]))


@pytest.mark.parametrize("function", ["pairwise_similarity", "mi_loss", "stability_loss"])
@pytest.mark.parametrize("layers", [None, (0, 0), (0, 2), (2, 2), [1, 2]])
def test_layers(function: str, layers):
    assert finite(call(function, layers=layers))


@pytest.mark.parametrize(
    "ranges", [{"mi_layers": (0, 0)}, {"stability_layers": [1, 2]}, {"mi_layers": (2, 2), "stability_layers": (0, 1)}]
)
def test_layers_of_a_config(ranges):
    assert finite(call("carma_loss", **ranges))


@pytest.mark.parametrize("function", WITH_TEMPERATURE)
@pytest.mark.parametrize(
    "temperature",
    [
        1,
        1e-3,
        1e3,
        np.float32(0.1),
        np.float64(0.1),
        np.int64(2),
        torch.tensor(0.1),
        torch.tensor(0.1, dtype=torch.float64),
        torch.tensor(0.1, dtype=torch.bfloat16),
        torch.nn.Parameter(torch.tensor(0.1)),
    ],
)
def test_temperatures(function: str, temperature):
    assert finite(call(function, temperature=temperature))


@pytest.mark.parametrize("function", WITH_MASK)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_masks(function: str, dtype: torch.dtype):
    mask = torch.ones(B, T)
    mask[0, 0] = 0
    assert finite(call(function, mask=mask.to(dtype)))
    assert finite(call(function, mask=torch.zeros(B, T, dtype=dtype)))


@pytest.mark.parametrize("function", WITH_PAIRS)
@pytest.mark.parametrize(
    "num_pairs", [None, 1, 8, 0.5, np.int64(8), torch.tensor(8), torch.tensor(8.0), torch.tensor(0)]
)
def test_counts(function: str, num_pairs):
    assert finite(call(function, num_pairs=num_pairs))


@pytest.mark.parametrize("function", WITH_PAIRS)
@pytest.mark.parametrize(
    "options",
    [
        *({"num_pairs": torch.tensor(value)} for value in (-3, -3.0, float("nan"))),
        *({"temperature": torch.tensor(value)} for value in (-0.1, 0.0, float("nan"))),
    ],
    ids=str,
)
def test_tensors_that_mean_nothing_give_nan(function: str, options):
    """Their values are not looked at, which would wait for the device; nor may they pass for a number."""
    result = call(function, **options)
    loss = result.loss if isinstance(result, ck.CarmaOutput) else result
    assert loss.isnan().all()


@pytest.mark.parametrize("function", WITH_PAIRS)
def test_no_pairs_in_the_whole_either(function: str):
    assert finite(call(function, spans=TokenSpans.from_lists([[], []], seq_len=T), num_pairs=0))


@pytest.mark.parametrize("function", WITH_PAIRS)
@pytest.mark.parametrize(
    "options", [{"match_negatives": k} for k in (1, 0.5, 500, np.float32(5))] + [{"negatives": "batch"}]
)
def test_negatives(function: str, options):
    assert finite(call(function, **options))


def test_weights_at_the_ends():
    task, carma = torch.tensor(2.0), torch.tensor(3.0)
    assert ck.total_loss(task, carma, 0) == 2
    assert ck.total_loss(task, carma, 1) == 3
    assert ck.total_loss(task, carma, np.float32(0.5)) == 2.5
    assert finite(ck.carma_loss(HIDDEN, SPANS, CarmaConfig(mi_weight=0, stability_weight=0.0, carma_weight=0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_out_dtypes(dtype: torch.dtype):
    assert ck.pairwise_similarity(HIDDEN, out_dtype=dtype).dtype == dtype
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert ck.pairwise_similarity(HIDDEN.to(dtype)).dtype == expected


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_backend_by_name(function: str, monkeypatch):
    assert finite(call(function, backend="torch"))
    monkeypatch.setenv("CARMA_KERNELS_BACKEND", "torch")
    assert finite(call(function))
    monkeypatch.setenv("CARMA_KERNELS_BACKEND", "")  # as a shell leaves it
    assert finite(call(function))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_argument_goes_before_the_variable(function: str, monkeypatch):
    monkeypatch.setenv("CARMA_KERNELS_BACKEND", "nonsense")
    assert finite(call(function, backend="torch"))


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cuda:0", "mps"])
def test_a_backend_is_chosen_for_any_device_with_a_reason(device, monkeypatch):
    monkeypatch.delenv("CARMA_KERNELS_BACKEND", raising=False)
    name, reason = ck.choose_backend(None, device)
    assert name == "torch"
    assert torch.device(device).type in reason
    assert ck.choose_backend("torch", device) == ("torch", "backend= asks for it")
    monkeypatch.setenv("CARMA_KERNELS_BACKEND", "torch")
    assert ck.choose_backend(None, device) == ("torch", "CARMA_KERNELS_BACKEND asks for it")


@pytest.mark.parametrize("function", WITH_PAIRS)
@pytest.mark.parametrize("shape", [(B, T), [B, T], torch.Size([B, T])])
def test_lists_of_pairs(function: str, shape):
    anchor, positive, negatives = PAIRS.anchor.long(), PAIRS.positive.long(), PAIRS.negatives.long()
    expected = call(function, spans=PAIRS)
    assert finite(expected)
    result = call(function, spans=PairIndex(anchor, positive, negatives, shape))
    assert torch.equal(getattr(result, "loss", result), getattr(expected, "loss", expected))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_mask_of_pairs(dtype: torch.dtype):
    mask = torch.arange(B * T).view(B, T) % 3
    pairs = PairIndex(PAIRS.anchor, PAIRS.positive, PAIRS.negatives, (B, T), mask.to(dtype))
    assert pairs.attention_mask is not None
    assert pairs.attention_mask.dtype == torch.bool
    assert torch.equal(pairs.attention_mask, mask != 0)


@pytest.mark.parametrize("function", WITH_PAIRS)
def test_borders_of_pairs(function: str):
    last = B * T - 1
    pairs = PairIndex(torch.tensor([0]), torch.tensor([last]), torch.tensor([[-1, 0, last]]), (B, T))
    assert finite(call(function, spans=pairs))
    without_slots = PairIndex(torch.tensor([0]), torch.tensor([1]), torch.zeros(1, 0, dtype=torch.int32), (B, T))
    assert finite(call(function, spans=without_slots))


@pytest.mark.parametrize("shape", [(0, 6), (2, 0), (1, 1)])
def test_batches_with_next_to_nothing(shape):
    B, T = shape
    hidden = torch.randn(2, B, T, 4, requires_grad=True)
    spans = TokenSpans.from_lists([[]] * B, seq_len=T)
    for function in FUNCTIONS:
        output = call(function, hidden, spans)
        assert finite(output)
        gradient = torch.autograd.grad(getattr(output, "loss", output).sum(), hidden)
        assert gradient[0].isfinite().all()
