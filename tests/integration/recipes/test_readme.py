"""README's Python blocks, pasted one after the other into a fresh process, run and train."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel

from tests.integration.trainer.kinds_of_tokenizers import of_kind

README = Path(__file__).parents[3] / "README.md"
CHECKS = [
    """
    assert loss.isfinite() and loss != task_loss
    assert spans.num_pairs and spans.is_padded
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    """,
    """
    [logged] = [entry for entry in trainer.state.log_history if "train_loss" in entry]
    assert 0 < logged["train_loss"] < float("inf")
    assert not torch.equal(before, torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    """,
    """
    assert MILoss is not ck.MILoss
    """,
    """
    assert carma.loss.isfinite() and carma.loss.requires_grad
    assert spans.is_padded and (carma.mi_per_layer > 0).all() and (carma.stability_per_layer > 0).all()
    """,
]
"""What has come true after each."""


def test_blocks_run_one_after_the_other(tmp_path: Path) -> None:
    tokenizer = of_kind("GPT-2")
    tokenizer.save_pretrained(tmp_path / "gpt2")  # a folder of that name goes before the hub
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=3, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == len(CHECKS)
    checked = "\n".join(block + check.replace("\n    ", "\n") for block, check in zip(blocks, CHECKS, strict=True))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    outcome = subprocess.run(
        [sys.executable, "-c", checked + "print('all of it ran')"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr[-4000:]
    assert outcome.stdout.endswith("all of it ran\n")
