"""Whole training steps with and without CARMA: `python -m bench.train_step --models gpt2 --save`.

The paper's models at their real sizes with random weights: forward, task loss and CARMA's, backward, AdamW. The
implementations take turns, step by step, so that what disturbs one disturbs all.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

import carma_kernels as ck
from bench import published, report, saved, vectorised
from bench.workloads import TEXT, Case, Workload
from carma_kernels.integrations.transformers import HiddenStateTap
from carma_kernels.measure import environment, peak_memory, synchronize


def _decoder(
    config: type[LlamaConfig | Qwen2Config],
    vocab_size: int,
    kv_heads: int,
    layers: int,
    width: int,
    heads: int,
    hidden: int,
) -> PreTrainedConfig:
    return config(
        vocab_size=vocab_size,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=hidden,
        tie_word_embeddings=True,
    )


_llama = partial(_decoder, LlamaConfig, 128256, 8)
_qwen = partial(_decoder, Qwen2Config, 151936, 2)

MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": GPT2Config,
    "gpt2-large": lambda: GPT2Config(n_layer=36, n_embd=1280, n_head=20),
    "gemma-2b": lambda: GemmaConfig(
        num_hidden_layers=18, hidden_size=2048, num_attention_heads=8, num_key_value_heads=1, intermediate_size=16384
    ),
    "llama-3.2-1b": lambda: _llama(16, 2048, 32, 8192),
    "llama-3.2-3b": lambda: _llama(28, 3072, 24, 8192),
    "qwen2.5-0.5b": lambda: _qwen(24, 896, 14, 4864),
    "qwen2.5-3b": lambda: _qwen(36, 2048, 16, 11008),
    "tiny": lambda: GPT2Config(  # to rehearse
        n_layer=3, n_embd=32, n_head=2, vocab_size=128, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
}

CONFIG = ck.CarmaConfig()
PAIRS_FINISH = 1_000
"""Pairs a step that the published loops evaluate on each sequence, at most: about a minute."""


class Step:
    """A training step of one model on one batch."""

    def __init__(
        self, model: str, case: Case, *, checkpointing: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        config = MODELS[model]()
        self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).train()
        if checkpointing:
            # the first name is transformers' since 5.x, which warns of the second
            enable = getattr(self.model, "activation_checkpointing_enable", None)
            (enable or self.model.gradient_checkpointing_enable)()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        B, T = case.attention_mask.shape
        self.mask = case.attention_mask.to(device)
        self.tokens = torch.randint(config.vocab_size, (B, T), device=device)  # [B, T]
        self.words = case.spans
        self.spans = ck.TokenSpans.from_lists(case.spans, seq_len=T, attention_mask=case.attention_mask).to(device)
        self.anchors = vectorised.index_anchors(case._replace(attention_mask=self.mask))

    def run(self, losses: str) -> None:
        """One step with one implementation of the CARMA losses, or "none"."""
        tapped = losses in {"tap", "pass-through"}
        with HiddenStateTap(self.model, pass_through=losses == "pass-through") if tapped else nullcontext() as tap:
            output = self.model(
                input_ids=self.tokens,
                attention_mask=self.mask,
                labels=self.tokens,
                output_hidden_states=losses not in {"none", "tap", "pass-through"},
            )
            loss = output.loss
            if losses != "none":
                carma = tap.carma_loss(self.spans, CONFIG, mask="all").loss if tapped else self._carma(losses, output)
                loss = ck.total_loss(loss, carma, CONFIG.carma_weight)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _carma(self, losses: str, output: Any) -> Tensor:
        hidden_states = output.hidden_states[1:]  # L times [B, T, D]
        if losses == "published loops":
            return published.carma_loss(hidden_states, self.words)
        if losses == "eager Gram":
            return vectorised.exact_carma_loss(hidden_states, self.anchors)
        return ck.carma_loss(hidden_states, self.spans, CONFIG, mask="all").loss


LOSSES = ("none", "published loops", "eager Gram", "carma_loss", "tap", "pass-through")


def measure(step: Step, losses: list[str], steps: int, device: torch.device) -> list[dict[str, Any]]:
    """Seconds and peak memory of each implementation, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    peaks: dict[str, int] = {}

    def timed(name: str) -> float:
        random.seed(0)
        synchronize(device)
        start = time.perf_counter()
        step.run(name)
        synchronize(device)
        return time.perf_counter() - start

    step.run("none")  # AdamW's state is there from now on
    for name in losses:
        peaks[name] = peak_memory(lambda name=name: step.run(name), device)  # this is its warm-up, too
    for _ in track(range(steps), description="steps", console=Console(stderr=True)):
        for name in losses:
            seconds[name].append(timed(name))
    return [{"losses": name, "seconds": seconds[name], "peak_bytes": peaks[name]} for name in losses]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and save if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["gpt2"], help="default: %(default)s")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="default: all")
    parser.add_argument("--shapes", nargs="+", default=["16x58"], metavar="BxT", help="default: %(default)s")
    parser.add_argument("--words", default="wordnet", help="wordnet, dense or a share of tokens (default: %(default)s)")
    parser.add_argument("--checkpointing", nargs="+", choices=["no", "yes"], default=["no"])
    parser.add_argument("--steps", type=int, default=5, help="of each (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true", help="write bench/results/<device>/<date>-train-step.json")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    runs = []
    for model in options.models:
        for shape in options.shapes:
            B, T = map(int, shape.split("x"))
            words = options.words if options.words in {"dense", "wordnet"} else float(options.words)
            workload = Workload(model, 1, B, T, 1, TEXT if words == "wordnet" and T > 58 else words)
            case = workload.build()
            for checkpointing in options.checkpointing:
                torch.manual_seed(0)
                step = Step(model, case, checkpointing=checkpointing == "yes", device=device, dtype=dtype)
                finish = case.num_pairs * B <= PAIRS_FINISH
                losses = [name for name in options.losses if finish or name != "published loops"]
                where = {"model": model, "B": B, "T": T, "words": workload.words, "dtype": str(dtype).split(".")[1]}
                where |= {"checkpointing": checkpointing == "yes"}
                runs += [where | run for run in measure(step, losses, options.steps, device)]
                del step
    sys.stdout.write(report.steps(runs) + "\n")
    if options.save:
        machine = environment() | {"torch_threads": options.threads, "load_at_start": round(load, 2)}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine["cpu"]
        path = saved.new_file(name, "train-step")
        saved.write(path, {"machine_info": machine | {"device": name}, "steps": runs})
        sys.stdout.write(f"written to {path}\n")


if __name__ == "__main__":
    main()
