"""What `import carma_kernels` costs a user who has torch and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.architecture.sources import ROOT

CODE = """
import sys
import torch

class Refuse:
    tried = []
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "transformers", "tokenizers", "rich", "matplotlib", "pytest", "csrc_ref"}:
            self.tried.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import carma_kernels as ck
assert not Refuse.tried, Refuse.tried
assert "carma_kernels.spans" in sys.modules  # what torch.load may make is known from here on
assert not {"carma_kernels.ops", "carma_kernels.kernels"} & set(sys.modules)

hidden = torch.randn(2, 1, 5, 4, requires_grad=True)
spans = ck.TokenSpans.from_lists([[(0, 2)]], seq_len=5)
ck.carma_loss(hidden, spans).loss.backward()
ck.pairwise_similarity(hidden).sum().backward()
ck.mi_loss(hidden, spans.sample_pairs(2)).backward()
assert hidden.grad.isfinite().all()
assert not torch.cuda.is_initialized()
print("done")
"""


def test_torch_is_enough():
    """Nothing optional is even looked for, no device is woken up, and the losses run."""
    environment = {name: value for name, value in os.environ.items() if name != "CARMA_KERNELS_BACKEND"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT.anchor,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"
