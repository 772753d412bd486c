"""Students in vLLM, whose engine runs them as models of Transformers.

`make test-vllm` installs it into an environment whose Python COCOMIX_VLLM names.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.vllm
PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7], [20, 30, 40, 50, 21, 31, 41, 51]]
TOKENS = 16
WIDE = {"hidden_size": 128}
"""Four heads of width 32, the smallest that vLLM's attention on a CPU takes."""
SERVE = """
import json, sys
from vllm import LLM, SamplingParams

folder, prompts, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = LLM(
    folder, skip_tokenizer_init=True, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=48,
    max_num_seqs=4, model_impl="transformers",
)
settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
texts = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings)
print("TEXTS", json.dumps([list(text.outputs[0].token_ids) for text in texts]))
"""


def serve(folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """Generate greedily in vLLM with the code that is saved with the model."""
    command = [os.environ["COCOMIX_VLLM"], "-c", SERVE, str(folder), json.dumps(PROMPTS), str(TOKENS)]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_MODULES_CACHE": str(cache)}
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=900)


def greedy(model) -> list[list[int]]:
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
        texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist())
    return texts


@pytest.mark.parametrize(("kind", "mixing"), [("gpt2", "add"), ("llama", "add"), ("llama", "none"), ("llama", "ntp")])
def test_greedy_texts_are_those_of_generate(kind, mixing, random_model, backbone_config, redraw, tmp_path) -> None:
    if mixing == "ntp":
        model = AutoModelForCausalLM.from_config(backbone_config(kind, **WIDE)).eval()
        redraw(model)
    else:
        model = random_model(kind, backbone=WIDE, mixing=mixing).float()
    model.save_pretrained(tmp_path / "model")
    done = serve(tmp_path / "model", tmp_path / "modules")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TEXTS ")] or [done.stderr[-3000:]]
    assert json.loads(line.removeprefix("TEXTS ")) == greedy(model)


def test_interleaved_models_are_refused_with_the_reason(random_model, tmp_path) -> None:
    random_model("llama", backbone=WIDE).float().save_pretrained(tmp_path / "model")
    done = serve(tmp_path / "model", tmp_path / "modules")
    assert done.returncode != 0
    assert "mixing is 'interleave', which keeps two cache entries per token above the mixer, and vllm" in done.stderr
