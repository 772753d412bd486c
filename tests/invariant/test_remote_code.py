"""A saved model carries its code along: it loads where cocomix is not installed."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from safetensors.torch import load_file

ELSEWHERE = """
import sys
sys.modules["cocomix"] = None  # any import of it now fails

import copy
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
out, *folders = sys.argv[1:]
results = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()
    model = copy.deepcopy(model)  # out of the mapped file, whose alignment changes how products round
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        results[f"{folder}:logits"] = model(ids).logits
    mask = torch.ones_like(ids)
    for cache in ("dynamic", "static"):
        results[f"{folder}:{cache}"] = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, cache_implementation=cache
        )
    with torch.no_grad():
        results[f"{folder}:steered"] = model(ids, steering={3: 9.0}).logits
try:
    import cocomix
except ImportError:
    save_file(results, out)
"""


@torch.no_grad()
def test_saved_models_run_where_cocomix_cannot_be_imported(random_model, tmp_path):
    out = tmp_path / "out.safetensors"
    models = {
        tmp_path / kind: random_model(kind, mixing=mixing)
        for kind, mixing in (("gpt2", "interleave"), ("llama", "add"))
    }
    for folder, model in models.items():
        model.save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(out), *map(str, models)],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    results = load_file(out)
    ids = torch.arange(1, 13).view(2, 6)
    mask = torch.ones_like(ids)
    for folder, model in models.items():
        assert torch.equal(results[f"{folder}:logits"], model(ids).logits)
        assert torch.equal(results[f"{folder}:steered"], model(ids, steering={3: 9.0}).logits)
        assert not torch.equal(results[f"{folder}:steered"], model(ids).logits)
        text = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert text.shape == (2, 12)
        assert torch.equal(results[f"{folder}:dynamic"], text)
        assert torch.equal(results[f"{folder}:static"], text)
