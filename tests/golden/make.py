"""Make the repository's golden set from the larger one: `python tests/golden/make.py ../shared/golden`.

The larger set holds what the published code (facebookresearch/RAM e6f051fb, projects/cocomix) computes with random
weights, in float32 and float64; its README describes each tensor. This script takes from it what the parity tests need
most, in less than 1 MB. File names and keys stay the same, except that a case is one file:

- Weights are the float32 originals. The tied head is left out: it is a copy of the embedding.
- Expected values are those of the float64 run, rounded to float32. Their error is below 1e-7 of the largest value.
- Scalars stay in float64, and integers are exact.
- `student_a`: losses, logits and the gradient of every weight.
- `greedy_a`: prompts and continuations. `trajectory_a`: batches, losses and gradient norms of six training steps.
- `attribution_a`: teacher, SAE and labels, with the residual stream, its gradient, latents and attribution scores.

Only the larger set has a second student, the values inside the mixer, the logits of each generated token, the final
weights of the training steps, and the teacher in TransformerLens' names.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
TIED = ("param/lm_head.weight", "hf/lm_head.weight")
SAE_WEIGHTS = ("encoder.weight", "decoder.weight", "latent_bias", "pre_bias")


def with_prefix(tensors: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key.startswith(prefixes) and key not in TIED}


def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.float() if v.dtype == torch.float64 and v.dim() > 0 else v for k, v in tensors.items()}


def make(larger: Path, target: Path) -> None:
    def load(name: str) -> dict[str, Tensor]:
        return load_file(larger / f"{name}.safetensors")

    sae = tuple(f"sae/{name}" for name in SAE_WEIGHTS)
    files = {
        "student_a": with_prefix(load("student_a"), "param/")
        | rounded(with_prefix(load("student_a_f64"), "io/", "out/", "grad/")),
        "attribution_a": with_prefix(load("attribution_a"), "hf/", *sae) | rounded(load("attribution_a_f64")),
        "greedy_a": {key: value for key, value in load("greedy_a").items() if not value.is_floating_point()},
        "trajectory_a": with_prefix(load("trajectory_a"), "step"),
    }
    for name, tensors in files.items():
        save_file(tensors, target / f"{name}.safetensors")
    for name, keys in {
        "student_a": ["config"],
        "attribution_a": ["config"],
        "trajectory_a": ["config", "hparams", "steps"],
    }.items():
        record = json.loads((larger / f"{name}.json").read_text())
        (target / f"{name}.json").write_text(json.dumps({key: record[key] for key in keys}, indent=1) + "\n")
    shutil.copyfile(larger / "attribution_a_sae_openai.pt", target / "attribution_a_sae_openai.pt")


if __name__ == "__main__":
    make(Path(sys.argv[1]), HERE)
