"""The subcommand `verify`: this installation against its own fp64 reference, on random problems, on this machine.

The reference is `csrc_ref`, plain PyTorch under autograd, fed in fp64 with the very numbers that the backend gets. An
error is the largest difference of an output or a gradient from the reference's, over the reference's largest entry.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import carma_kernels
from carma_kernels import PairIndex, TokenSpans, choose_backend
from carma_kernels._backend import BACKENDS
from carma_kernels._runtime import INTERPRET
from carma_kernels.doctor import devices, one_line

TOLERANCE = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-5, 1e-5),
    # computed in fp32, so the value is as good as there; the gradient is rounded to the dtype, which costs eps / 2
    torch.bfloat16: (1e-5, torch.finfo(torch.bfloat16).eps),
    torch.float16: (1e-5, torch.finfo(torch.float16).eps),
}
"""What an error may be: of the value, of the gradients"""


INTERPRETED_CASES = 2
"""Random problems for each check in Triton's interpreter, a thousand times slower"""


class Check(NamedTuple):
    """A function with the options that lead to code of their own."""

    function: str
    negatives: str = "-"
    metric: str = "-"
    long: bool = False
    """sequences that the Triton kernels do not take in one tile"""


CHECKS = (
    *(Check("pairwise_similarity", metric=metric) for metric in ("cosine", "dot")),
    *itertools.starmap(Check, itertools.product(["mi_loss"], ["sequence", "batch", "sampled"], ["cosine", "dot"])),
    Check("stability_loss"),
    *(Check("carma_loss", negatives, "cosine") for negatives in ("sequence", "batch", "sampled")),
    Check("carma_loss", "sequence", "cosine", long=True),
)


@dataclass(frozen=True)
class Problem:
    """One random call: ragged batches with NaN in the padding, a zero vector, words up to a whole sequence."""

    check: Check
    hidden: tuple[Tensor, ...]
    """one `[L, B, T, D]`, or L times `[B, T, D]`"""
    pairs: TokenSpans | PairIndex
    mask: Tensor | None
    temperature: float | Tensor
    options: dict[str, Any]
    seed: int

    def __str__(self) -> str:
        """Shape, layout and options."""
        layout = "one tensor" if self.hidden[0].dim() == 4 else "a list"
        temperature = f"{float(self.temperature):.3g}" + (" (a tensor)" if isinstance(self.temperature, Tensor) else "")
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        masked = ", masked" if self.mask is not None else ""
        return f"{self.shape} as {layout}{masked}, temperature={temperature}{options}"

    @property
    def shape(self) -> str:
        """L, B, T and D, readable."""
        first = self.hidden[0]
        L, B, T, D = first.shape if first.dim() == 4 else (len(self.hidden), *first.shape)
        return f"L{L} B{B} T{T} D{D}"


class Outcome(NamedTuple):
    """How far a backend is from the reference on one problem."""

    problem: Problem
    value_error: float
    gradient_error: float
    excess: float
    """the larger error over its tolerance: a miss above 1"""
    failure: str
    """the exception, if it raised one"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `verify`."""
    parser.add_argument("--cases", type=_at_least_one, default=5, metavar="N", help="random problems for each check")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random problems")
    parser.add_argument(
        "--device", default="all", help="cpu, cuda:0, ...; all for every device that torch can use here"
    )
    parser.add_argument(
        "--backend", choices=("all", *BACKENDS), default="all", help="what to hold against the reference"
    )
    parser.add_argument("--verbose", action="store_true", help="a line for each problem, not only for each check")


def run(args: argparse.Namespace) -> int:
    """Check and print a table; returns 0 if every check is within its tolerance, 1 if not, 2 for a bad device."""
    try:
        import csrc_ref  # the reference: this is the one place of the package that may
    except ModuleNotFoundError:
        _say("verify needs csrc_ref, the reference, which comes in the same wheel:")
        _say("pip install --force-reinstall carma-kernels")
        return 1
    try:
        chosen = devices() if args.device == "all" else [_usable(args.device)]
    except Exception as error:
        _say(f"--device {args.device}: {one_line(error)}. Devices that torch can use here: {_listed(devices())}.")
        return 2
    with _interpreter(chosen, args.backend):
        return _check_devices(csrc_ref, chosen, args)


@contextmanager
def _interpreter(devices: list[torch.device], backend: str) -> Iterator[None]:
    """Have Triton interpret its kernels, unless a GPU is to run them: one process cannot do both."""
    if backend == "torch" or _has_gpu(devices) or INTERPRET in os.environ or "triton" in sys.modules:
        yield
        return
    os.environ[INTERPRET] = "1"  # read when Triton is imported, which torch may do at any time
    try:
        yield
    finally:
        del os.environ[INTERPRET]


def _check_devices(reference: Any, devices: list[torch.device], args: argparse.Namespace) -> int:
    started = time.perf_counter()
    within: list[bool] = []
    skipped: list[str] = []
    for device, backend in itertools.product(devices, BACKENDS if args.backend == "all" else (args.backend,)):
        if args.backend == "all" and backend == "triton" and device.type == "cpu" and _has_gpu(devices):
            continue  # runs on that
        try:
            choose_backend(backend, device)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            skipped.append(f"Not checked: {backend} backend on {device}. {one_line(error)}")
            continue
        within += _check_all(reference, device, backend, args)
    for line in skipped:
        _say(line)
    if not within:
        _say("Nothing was checked.")
        return 1
    _say(f"{sum(within)} of {len(within)} checks within tolerance, in {time.perf_counter() - started:.0f} s.")
    if not all(within):
        _say("MISS: this installation does not compute what the reference does. Please report it with the output of")
        _say("`carma-kernels doctor` and `carma-kernels verify --verbose`.")
    return 0 if all(within) else 1


def _check_all(reference: Any, device: torch.device, backend: str, args: argparse.Namespace) -> Iterator[bool]:
    """Print the table of one backend on one device; yields for each of its rows whether it is within tolerance."""
    interpreted = backend == "triton" and device.type == "cpu"
    cases = min(args.cases, INTERPRETED_CASES) if interpreted else args.cases
    how = ", in Triton's interpreter" if interpreted else ""
    _say(f"{backend} backend on {device}{how}, random problems a check: {cases}; errors are relative, of the worst one")
    _say(_row("function", "negatives", "metric", "dtype", "worst at", "value", "allowed", "gradients", "allowed", ""))
    for check, dtype in itertools.product(CHECKS, TOLERANCE):
        if dtype == torch.float64 and (backend == "triton" or device.type == "mps"):
            continue  # has no fp64
        outcomes = [
            _compare(reference, random_problem(check, dtype, args.seed, case), dtype, device, backend)
            for case in range(cases)
        ]
        for line in _report(check, dtype, outcomes, args.verbose):
            _say(line)
        yield all(outcome.excess <= 1 for outcome in outcomes)


def random_problem(check: Check, dtype: torch.dtype, seed: int, case: int) -> Problem:
    """The problem with this number, the same on every machine."""
    rng = random.Random(f"{check} {seed} {case}")
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    L, B, T = rng.randint(2, 4), 3 if case == 0 else rng.randint(1, 3), rng.randint(3, 14)
    if check.long:
        B, T = 2, rng.randint(130, 150)
    D = rng.choice((2, 3, 8, 17, 40))  # with D = 1 a cosine is 1 or -1, and has no gradient
    spans = _random_spans(rng, B, T)
    valid = spans.attention_mask  # [B, T]

    hidden = torch.randn(L, B, T, D, generator=generator, dtype=torch.float64)
    if check.metric == "dot":
        hidden /= math.sqrt(D)  # or exp(s) would be 0 or inf for all but one token
    hidden[rng.randrange(L), rng.randrange(B), rng.randrange(T)] = 0.0
    masked = check.function != "mi_loss" and (case == 0 or rng.random() < 0.7)
    if masked or check.function == "mi_loss":
        hidden[:, ~valid] = math.nan
    hidden = hidden.to(dtype)

    start = rng.randint(0, L - 1)
    layers = rng.choice((None, (start, rng.randint(start, L - 1))))
    temperature: float | Tensor = torch.tensor(rng.uniform(0.1, 1.0))
    if rng.random() < 0.5:
        temperature = float(temperature)
    return Problem(
        check,
        (hidden,) if rng.random() < 0.5 else hidden.unbind(0),
        _random_pairs(spans, rng, generator, layers, L) if check.negatives == "sampled" else spans,
        valid if masked else None,
        temperature,
        _random_options(check, dtype, rng, layers),
        rng.getrandbits(60),
    )


def _random_spans(rng: random.Random, B: int, T: int) -> TokenSpans:
    """Words of 1 to 4 tokens among tokens in no word, or one word that fills its sequence; padding on either side."""
    words: list[list[tuple[int, int]]] = []
    mask = []
    for b in range(B):
        length = T if b == 0 or rng.random() < 0.3 else rng.randint(1, T)
        at = first = rng.choice((0, T - length))
        mask.append([first <= t < first + length for t in range(T)])
        longest = length if rng.random() < 0.1 else 4
        words.append([])
        while at < first + length:
            end = min(first + length, at + rng.randint(1, longest) if longest == 4 else at + longest)
            if rng.random() < 0.8:
                words[-1].append((at, end))
            at = end
    return TokenSpans.from_lists(words, seq_len=T, attention_mask=mask)


def _random_pairs(
    spans: TokenSpans, rng: random.Random, generator: torch.Generator, layers: tuple[int, int] | None, L: int
) -> PairIndex:
    """Sampled pairs with some slots empty."""
    num_layers = L if layers is None else layers[1] - layers[0] + 1
    pairs = spans.sample_pairs(rng.randint(1, 5), generator, rng.choice((None, num_layers)))
    negatives = pairs.negatives.clone()  # [P, K] or [L, P, K]
    negatives[torch.rand(negatives.shape, generator=generator) < 0.2] = -1
    return PairIndex(pairs.anchor, pairs.positive, negatives, pairs.shape)


def _random_options(
    check: Check, dtype: torch.dtype, rng: random.Random, layers: tuple[int, int] | None
) -> dict[str, Any]:
    of_spans: dict[str, Any] = {}
    if check.negatives in ("sequence", "batch"):
        of_spans = {"negatives": check.negatives, "match_negatives": rng.choice((None, 5))}
    reduction = rng.choice(("mean", "sum", "none"))
    if check.function == "pairwise_similarity":
        return {"metric": check.metric, "layers": layers, "out_dtype": torch.promote_types(dtype, torch.float32)}
    if check.function == "stability_loss":
        return {"layers": layers, "reduction": reduction}
    if check.function == "mi_loss":
        num_pairs = None if reduction == "sum" else rng.choice((None, 7))
        return {"metric": check.metric, "layers": layers, "reduction": reduction, "num_pairs": num_pairs, **of_spans}
    return {"metric": check.metric, "mi_layers": layers, "mi_weight": 0.7, "stability_weight": 0.4, **of_spans}


def _compare(reference: Any, problem: Problem, dtype: torch.dtype, device: torch.device, backend: str) -> Outcome:
    values, gradients = _evaluate(reference, problem, torch.float64, torch.device("cpu"))
    try:
        got_values, got_gradients = _evaluate(carma_kernels, problem, dtype, device, backend=backend)
    except Exception as error:
        return Outcome(problem, math.inf, math.inf, math.inf, f"{type(error).__name__}: {one_line(error)}")
    errors = _error(got_values, values), _error(got_gradients, gradients)
    excess = max(error / allowed for error, allowed in zip(errors, TOLERANCE[dtype], strict=True))
    return Outcome(problem, *errors, excess, "")


def _evaluate(
    package: Any, problem: Problem, dtype: torch.dtype, device: torch.device, **backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a random combination of them with respect to each layer and the temperature."""
    leaves = [layer.detach().to(device, dtype).requires_grad_() for layer in problem.hidden]
    hidden = leaves[0] if leaves[0].dim() == 4 else list(leaves)
    temperature = problem.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
        leaves.append(temperature)
    mask = None if problem.mask is None else problem.mask.to(device)
    outputs = _outputs(package, problem, hidden, temperature, mask, backend)

    generator = torch.Generator().manual_seed(problem.seed)
    total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=device)
    for output in outputs:
        upstream = torch.rand(output.shape, generator=generator, dtype=torch.float64) + 0.5
        if output.requires_grad:
            total = total + (output * upstream.to(output)).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    gradients = [
        torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, found, strict=True)
    ]
    if isinstance(temperature, Tensor):
        # its terms can cancel, so that its own size says little: held against L / tau
        gradients[-1] = torch.stack([gradients[-1], (total / temperature).detach()])
    if problem.hidden[0].dim() == 4:
        gradients[:1] = gradients[0].unbind(0)  # each layer is held against its own size
    return [output.detach() for output in outputs], gradients


def _outputs(
    package: Any,
    problem: Problem,
    hidden: Tensor | list[Tensor],
    temperature: float | Tensor,
    mask: Tensor | None,
    backend: dict[str, str],
) -> list[Tensor]:
    function = getattr(package, problem.check.function)
    device = hidden[0].device
    if problem.check.function == "pairwise_similarity":
        options = problem.options
        if package is not carma_kernels:
            options = {**options, "out_dtype": torch.float64}
        return [function(hidden, temperature=temperature, mask=mask, **options, **backend)]
    if problem.check.function == "stability_loss":
        return [function(hidden, mask=mask, **problem.options, **backend)]
    pairs = problem.pairs.to(device)
    if problem.check.function == "mi_loss":
        return [function(hidden, pairs, temperature=temperature, **problem.options, **backend)]
    config = package.CarmaConfig(temperature=temperature, **problem.options)
    *losses, num_pairs = function(hidden, pairs, config, mask=mask, **backend)
    return [*losses, torch.tensor(float(num_pairs))]


def _error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference over the largest entry wanted, of the worst tensor; inf for NaN or another shape.

    An entry below the dtype's smallest normal number counts as large as that: such numbers have fewer digits.
    """
    errors = [0.0]
    for tensor, reference in zip(got, want, strict=True):
        if tensor.shape != reference.shape:
            return math.inf
        if reference.numel():
            size = max(float(reference.abs().max()), torch.finfo(tensor.dtype).smallest_normal)
            error = float((tensor.cpu().double() - reference).abs().max()) / size
            errors.append(math.inf if math.isnan(error) else error)
    return max(errors)


def _report(check: Check, dtype: torch.dtype, outcomes: list[Outcome], verbose: bool) -> Iterator[str]:
    worst = max(outcomes, key=lambda outcome: outcome.excess)
    value_tolerance, gradient_tolerance = TOLERANCE[dtype]
    yield _row(
        check.function,
        check.negatives,
        check.metric,
        str(dtype).removeprefix("torch."),
        worst.problem.shape,
        f"{max(outcome.value_error for outcome in outcomes):.1e}",
        f"{value_tolerance:.1e}",
        f"{max(outcome.gradient_error for outcome in outcomes):.1e}",
        f"{gradient_tolerance:.1e}",
        "MISS" if worst.excess > 1 else "ok",
    )
    for case, outcome in enumerate(outcomes):
        if verbose or (outcome is worst and outcome.excess > 1):
            errors = outcome.failure or f"value {outcome.value_error:.1e}, gradients {outcome.gradient_error:.1e}"
            yield f"    problem {case}: {outcome.problem}: {errors}"


def _row(*cells: str) -> str:
    widths = (19, 9, 6, 8, 13, 7, 7, 9, 7, 4)
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _has_gpu(devices: list[torch.device]) -> bool:
    return any(device.type == "cuda" for device in devices)


def _usable(name: str) -> torch.device:
    device = torch.device(name)
    torch.empty(1, device=device).cpu()
    return device


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number >= 1, got {text!r}")
    return int(text)


def _listed(items: list[Any]) -> str:
    return ", ".join(map(str, items))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()  # a line is progress
