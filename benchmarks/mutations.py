"""Do the tests catch small faults? Apply one mutation at a time to a copy of the last commit and run the tests on it.

    python benchmarks/mutations.py --json benchmarks/results/mutations.json

The tests closest to a mutation run first; if it survives them, all other tests but the slow ones follow.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("src/cocomix")


class Mutation(NamedTuple):
    """One fault."""

    name: str
    file: str
    """Path in the package."""
    old: str
    """Text that occurs exactly once in the file."""
    new: str
    """Text that replaces it."""
    near: str
    """Test files and folders to run first, relative to `tests`, separated by blanks."""


MODEL = "parity/test_golden_student.py unit/models unit/objectives invariant"
TRAINER = "unit/training e2e/test_interruption.py e2e/test_path.py"
MUTATIONS = [
    Mutation("mixer: the slot keeps the mean of h", "models/mixer.py",
             "interleave(h, c + h - stats.mean if residual else c)", "interleave(h, c + h if residual else c)", MODEL),
    Mutation("mixer: the largest magnitudes are mixed", "models/mixer.py",
             "z.topk(self.num_active_concepts, dim=-1)", "z.abs().topk(self.num_active_concepts, dim=-1)", MODEL),
    Mutation("mixer: the pause vector is not trained", "models/mixer.py",
             "self.vector.expand_as(h)", "self.vector.detach().expand_as(h)", MODEL),
    Mutation("concept loss: empty slots count as labels", "models/losses.py",
             "at_labels.sum(-1) / labels_of_token.clamp(min=1)", "at_labels.sum(-1) / concept_ids.shape[-1]",
             MODEL),
    Mutation("λ: the concept loss is not weighted", "models/causal_lm.py",
             "self.config.concept_loss_weight * prediction", "1.0 * prediction", MODEL),
    Mutation("fused loss: rows without a label change the bias", "models/linear_loss.py",
             "_product(has_loss_.T.to(products), grad_z)[0]", "grad_z.sum(0)", MODEL),
    Mutation("distillation: gradients shrink with temperature", "models/divergence.py",
             "* difference).sum() * temperature**2", "* difference).sum()",
             "unit/models/test_divergence.py unit/objectives"),
    Mutation("attribution: the activation is left out", "concepts/attribution.py",
             "return latents.values * torch.cat(along)", "return torch.cat(along)",
             "unit/concepts/test_extraction.py parity/test_golden_attribution.py"),
    Mutation("selection: inactive latents become labels", "concepts/attribution.py",
             "(latents.values > 0) & has_target.unsqueeze(-1)", "(latents.values >= 0) & has_target.unsqueeze(-1)",
             "parity/test_plain.py unit/concepts/test_extraction.py parity/test_golden_attribution.py"),
    Mutation("alignment: one teacher token too late", "concepts/alignment.py",
             'first = np.searchsorted(teacher_ends, student_ends, side="left")',
             'first = np.searchsorted(teacher_ends, student_ends, side="right")', "unit/concepts/test_alignment.py"),
    Mutation("SAE: the threshold is ignored", "concepts/sae.py",
             "before <= self.threshold, 0.0", "before <= 0, 0.0",
             "unit/concepts/test_sae_loading.py parity/test_sae_libraries.py"),
    Mutation("mtp: all heads are divided by the first one's tokens", "objectives/multi_token.py",
             "(ids.shape[1] - ahead)", "(ids.shape[1] - 1)", "unit/objectives invariant/test_multi_token.py"),
    Mutation("cache: the upper stack is cropped by half", "models/cache.py",
             "self.upper.crop(self.slots * tokens_to_remove)", "self.upper.crop(tokens_to_remove)",
             "unit/models/test_cache.py invariant/test_model.py"),
    Mutation("trainer: targets of the first micro-batch only", "training/trainer.py",
             "torch.stack([c[name] for c in counted]).sum()", "counted[0][name]", TRAINER),
    Mutation("timer: evaluation counts as training", "training/trainer.py",
             "with self.timer.paused():\n            return self._evaluate_now",
             "with contextlib.nullcontext():\n            return self._evaluate_now", TRAINER),
    Mutation("resume: the optimizer starts from nothing", "training/trainer.py",
             "set_optimizer_state_dict(self.model, self._bare_optimizer(), state, options=FULL_STATE)",
             "del state", TRAINER),
    Mutation("resume: an interrupted checkpoint is used", "training/checkpoints.py",
             "if (checkpoint / COMPLETE).exists():", "if checkpoint.exists():", TRAINER),
    Mutation("schedule: no warm-up", "training/config.py",
             "warmup_steps=round(config.warmup_ratio * config.steps())", "warmup_steps=0", TRAINER),
    Mutation("packing: remainders of batches are lost", "data/packing.py",
             "np.concatenate([rest, piece.astype(dtype, copy=False)])", "piece.astype(dtype, copy=False)",
             "unit/data/test_packing.py unit/data"),
    Mutation("stages: another input is accepted", "pipeline/stage.py",
             "needed.record().fingerprint != record.inputs[needed.name]", "False",
             "unit/pipeline/test_stage.py e2e/test_path.py"),
    Mutation("stages: the claim goes before the rename", "pipeline/stage.py",
             "        files.finish(self.folder)\n",
             "        (files.partial(self.folder) / CLAIM_FILE).unlink()\n        files.finish(self.folder)\n",
             "unit/pipeline/test_stage.py unit/common/test_files.py e2e/test_interruption.py"),
    Mutation("lock: two commands may write", "common/locking.py",
             "fcntl.LOCK_EX", "fcntl.LOCK_SH", "unit/common/test_locking.py unit/pipeline/test_output_folder.py"),
    Mutation("FLOPs: attention over tokens instead of slots", "models/flops.py",
             "attention_flops(model, above, slots * block_size)", "attention_flops(model, above, block_size)",
             "unit/models/test_flops.py"),
    Mutation("statistics: Holm becomes no correction", "evaluation/verdicts.py",
             "p_values[order] * np.arange(len(order), 0, -1)", "p_values[order]", "unit/evaluation/test_verdicts.py"),
    Mutation("statistics: bootstrap with a fixed denominator", "evaluation/statistics.py",
             "counts[chosen].sum(1)", "counts.sum()", "unit/evaluation"),
    Mutation("catalog: several contexts of one block", "catalog/activity.py",
             "self._merge(one_per_block(firings))", "self._merge(firings)", "unit/catalog"),
]  # fmt: skip


def mutated(mutation: Mutation, root: Path) -> str:
    """Return the file's text with the fault; exit with an error if the old text is not in it exactly once."""
    text = (root / PACKAGE / mutation.file).read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        sys.exit(f"{mutation.name}: {mutation.file} must have this text exactly once: {mutation.old!r}")
    return text.replace(mutation.old, mutation.new)


def killer(copy: Path, tests: list[str]) -> str | None:
    """Return the first test that fails in the copy, or None."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, "-m", "not slow and not gpu and not browser", *tests],
                         cwd=copy, env=environment, capture_output=True, text=True)  # fmt: skip
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", run.stdout, re.MULTILINE)
    if run.returncode and not failed:
        sys.exit(f"pytest ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    return failed[1] if failed else None


def main() -> None:
    """Apply the mutations one by one, and write which test kills each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--only", default="", help="only mutations whose name contains this text")
    options = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True).strip()
    results: list[dict[str, str | None]] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        copy = Path(folder) / "checkout"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", copy, commit], check=True)
        chosen = [(each, mutated(each, copy)) for each in MUTATIONS if options.only in each.name]
        for mutation, text in chosen:
            file = copy / PACKAGE / mutation.file
            original = file.read_text(encoding="utf-8")
            file.write_text(text, encoding="utf-8")
            near = [f"tests/{each}" for each in mutation.near.split()]
            killed_by = killer(copy, near) or killer(copy, ["tests", *(f"--ignore={each}" for each in near)])
            file.write_text(original, encoding="utf-8")
            print(f"{'killed' if killed_by else 'SURVIVED'}  {mutation.name}  ({killed_by})", flush=True)
            results.append({"mutation": mutation.name, "file": mutation.file, "killed_by": killed_by})
            figures = {"commit": commit, "date": datetime.date.today().isoformat(), "mutations": results}
            options.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        subprocess.run([*git, "worktree", "remove", "--force", copy], check=True)


if __name__ == "__main__":
    main()
