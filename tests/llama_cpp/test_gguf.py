"""Students as GGUF files, converted by llama.cpp's own converter and read by llama.cpp.

`make test-gguf` installs both into an environment that COCOMIX_LLAMA_CPP names, the folder of its packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import cocomix
from cocomix.cli.main import main
from cocomix.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.llama_cpp
PACKAGES = os.environ.get("COCOMIX_LLAMA_CPP", "")
TEXT = "The river crosses the garden, and nobody's letter, naïve or not, opens 3 windows.\n\n    Return x\t== y;"
READ = """
import json, sys
import numpy as np
from gguf import GGUFReader
from llama_cpp import Llama

path, text = sys.argv[1:]
model = Llama(path, n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0)  # a float32 cache
ids = model.tokenize(text.encode(), add_bos=False)
model.eval(ids)
architecture = GGUFReader(path).fields["general.architecture"].contents()
json.dump([architecture, ids, model.scores[: len(ids)].tolist()], sys.stdout)
"""


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return F.cross_entropy(logits[:-1], ids[1:]).exp().item()


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 2e-3), ("fp16", 5e-3)])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
@torch.no_grad()
def test_a_gguf_file_predicts_what_the_student_does(
    kind: str,
    dtype: str,
    tolerance: float,
    backbone_config: Callable,
    relative_error: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", PACKAGES)  # of the converter's process
    monkeypatch.syspath_prepend(PACKAGES)
    tokenizer = train_tokenizer([TEXT * 3], 320)
    width = {"hidden_size": 64, "head_dim": 16} if kind == "qwen3" else {"hidden_size": 64}
    backbone = backbone_config(kind, vocab_size=len(tokenizer), eos_token_id=0, tie_word_embeddings=True, **width)
    model = cocomix.CoCoMixForCausalLM(
        cocomix.CoCoMixConfig(backbone, insert_layer=1, num_concepts=40, num_active_concepts=5, mixing="none")
    ).eval()
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    target = tmp_path / "student.gguf"
    assert main(["export", str(tmp_path / "student"), str(target), "--to", "gguf", "--dtype", dtype]) == 0

    done = subprocess.run([sys.executable, "-c", READ, target, TEXT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    architecture, ids, scores = json.loads(done.stdout)
    wanted = AutoTokenizer.from_pretrained(tmp_path / "student")(TEXT, return_tensors="pt").input_ids
    assert architecture == kind and ids == wanted[0].tolist()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()(wanted).logits[0]
    assert relative_error(torch.tensor(scores), ours) < tolerance  # llama.cpp's GELU reads a table in float16
    found, expected = (perplexity(logits, wanted[0]) for logits in (torch.tensor(scores), ours))
    assert found == pytest.approx(expected, rel=tolerance)
