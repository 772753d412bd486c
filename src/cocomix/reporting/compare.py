"""Compare finished runs: losses at equal cost, and the cost at which one reaches another's loss.

Runs that differ only in their seed form a group. Groups are compared by their mean; the spread over seeds is reported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cocomix.common import fingerprint, portable
from cocomix.common.errors import InputError
from cocomix.evaluation.record import load_evaluations
from cocomix.evaluation.statistics import PairedDifference, paired_difference
from cocomix.evaluation.verdicts import LOSS_MARGIN, verdicts
from cocomix.reporting.costs import AXES, at_equal_cost, cost_to_reach, losses_of, training_tokens
from cocomix.reporting.envelope import plain_tokens
from cocomix.reporting.seeds import CostDifference, Curve, SeedDifference, cost_difference, loss_difference, starts_at
from cocomix.training.documents import DocumentLosses, load_document_losses
from cocomix.training.run import Run, load_run

SAME = {"validation": "validation text", "tokenizer": "tokenizer", "block_size": "block size"}
"""Fields that compared runs must have in common, and their names in messages."""
INDEPENDENT_OF_THE_MODEL = ("name", "output", "seed", "seeds", "replicates", "parallel", "students", "catalog")
"""Recipe keys that may differ between the runs of a group."""


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        name: name in tables.
        runs: the runs, ordered by seed.
        folders: their folders.
        documents: their losses per validation document; None unless all runs have them.
    """

    name: str
    runs: list[Run]
    folders: list[Path]
    documents: list[DocumentLosses] | None

    @property
    def final_losses(self) -> np.ndarray:
        """Final validation losses (seeds,)."""
        return np.array([run.metrics["loss"] for run in self.runs])

    @property
    def curves(self) -> list[Curve]:
        """Validation curve of each seed, against tokens."""
        return [Curve(training_tokens(run, self.runs), losses_of(run)) for run in self.runs]

    @property
    def mean_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and the mean loss over seeds at each evaluation; all runs evaluate at the same tokens."""
        curves = self.curves
        return curves[0].costs, np.mean([curve.losses for curve in curves], axis=0)


@dataclass(frozen=True)
class Comparison:
    """A group compared with the baseline.

    Attributes:
        run: name of the group.
        baseline: name of the baseline.
        seeds: number of seeds of the group and of the baseline.
        loss_difference: mean final loss of the group minus that of the baseline, nats per token; negative is better.
        loss_over_seeds: the same difference over seed pairs, with an interval; None unless both have the same two or
            more seeds.
        documents: the same difference over validation documents, with an interval if there are enough; None if not
            recorded.
        tokens_to_baseline_loss: training tokens at which the group's mean validation curve first reaches the
            baseline's mean final loss; None if it never does.
        tokens_ratio: those tokens divided by the baseline's.
        tokens_at_most: whether these are upper bounds, because the first evaluation already reaches the loss.
        tokens_over_seeds: that ratio minus 1 over seed pairs; None unless both have the same two or more seeds.
        flops_to_baseline_loss: the group's own training FLOPs until then.
        flops_ratio: those FLOPs divided by the baseline's.
    """

    run: str
    baseline: str
    seeds: tuple[int, int]
    loss_difference: float
    loss_over_seeds: SeedDifference | None
    documents: PairedDifference | None
    tokens_to_baseline_loss: float | None
    tokens_ratio: float | None
    tokens_at_most: bool
    tokens_over_seeds: CostDifference | None
    flops_to_baseline_loss: float | None
    flops_ratio: float | None


def compare_to_baseline(group: Group, baseline: Group) -> Comparison:
    """Compare a group with the baseline."""
    final = float(baseline.final_losses.mean())
    costs, losses = group.mean_curve
    tokens = cost_to_reach(costs, losses, final)
    run, other = group.runs[0], baseline.runs[0]
    flops = None if tokens is None else tokens * run.training_flops_per_token
    paired = None
    if group.documents is not None and baseline.documents is not None:
        counts = [each.tokens for each in (*group.documents, *baseline.documents)]
        if all(np.array_equal(each, counts[0]) for each in counts):  # otherwise the documents differ
            paired = paired_difference(group.documents, baseline.documents)
    return Comparison(
        run=group.name,
        baseline=baseline.name,
        seeds=(len(group.runs), len(baseline.runs)),
        loss_difference=float(group.final_losses.mean()) - final,
        loss_over_seeds=loss_difference(group.curves, baseline.curves) if _paired(group, baseline) else None,
        documents=paired,
        tokens_to_baseline_loss=tokens,
        tokens_ratio=None if tokens is None else tokens / other.tokens,
        tokens_at_most=tokens is not None and starts_at(losses, final),
        tokens_over_seeds=cost_difference(group.curves, baseline.curves) if _paired(group, baseline) else None,
        flops_to_baseline_loss=flops,
        flops_ratio=None if flops is None else flops / (other.tokens * other.training_flops_per_token),
    )


def _paired(group: Group, baseline: Group) -> bool:
    return len(group.runs) > 1 and [run.seed for run in group.runs] == [run.seed for run in baseline.runs]


def with_verdicts(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Convert comparisons to dictionaries, each with a verdict on its loss over seeds and one over documents.

    A verdict is None if there was nothing to test. The verdicts over seeds are corrected for their number; so are the
    verdicts over documents.
    """
    by_seeds = [each.loss_over_seeds for each in comparisons]
    by_documents = [each.documents for each in comparisons]
    over_seeds = verdicts([None if found is None else found.test(0.0, LOSS_MARGIN) for found in by_seeds])
    over_documents = verdicts([None if found is None else found.test for found in by_documents])
    return [
        {
            **asdict(each),
            "verdict_over_seeds": None if each.loss_over_seeds is None else str(seeds),
            "verdict_over_documents": str(documents) if each.documents and each.documents.test else None,
        }
        for each, seeds, documents in zip(comparisons, over_seeds, over_documents, strict=True)
    ]


def compare_runs(folders: list[Path]) -> dict[str, Any]:
    """Compare runs at equal cost, and each group with the baseline: the first `ntp` group, or else the first group.

    Raises:
        InputError: a folder has no run or is given twice, or runs were evaluated on different text or with different
            tokenizers or block sizes.
    """
    runs = [load_run(folder) for folder in folders]
    for folder, run in zip(folders[1:], runs[1:], strict=True):
        for key, what in SAME.items():
            if getattr(run, key) != getattr(runs[0], key):
                raise InputError(
                    f"{folder} and {folders[0]} were evaluated with a different {what}; their losses cannot be compared"
                )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"the same run is given twice: {', '.join(map(str, folders))}")
    groups = _grouped(folders, runs)
    every = [run for group in groups for run in group.runs]
    labels = [_label(group, run) for group in groups for run in group.runs]
    baseline = next((group for group in groups if group.runs[0].method == "ntp"), groups[0])
    equal = {name: at_equal_cost(every, axis) for name, axis in AXES.items()}
    results: dict[str, Any] = {
        "notes": training_differences(groups),
        "students": {
            label: {**_figures(run), "costs": {name: axis.costs(run, every).tolist() for name, axis in AXES.items()}}
            for label, run in zip(labels, every, strict=True)
        },
        "evaluations": {
            _label(group, run): [asdict(each) for each in load_evaluations(folder)]
            for group in groups
            for run, folder in zip(group.runs, group.folders, strict=True)
        },
        "groups": {group.name: [_label(group, run) for run in group.runs] for group in groups},
        "equal_cost": {
            name: {"budget": found.budget, "losses": dict(zip(labels, found.losses, strict=True))}
            for name, found in equal.items()
        },
        "comparisons": with_verdicts([compare_to_baseline(each, baseline) for each in groups if each is not baseline]),
    }
    for comparison in results["comparisons"]:
        comparison["baseline_to_final_loss"] = plain_tokens(results, comparison["run"], baseline.name)._asdict()
    return results


def training_differences(groups: Sequence[Group]) -> list[str]:
    """State what differs between the trainings of the groups that a comparison would like to be equal, a line each."""
    tokens = {group.name: f"{group.runs[0].tokens:,} tokens" for group in groups}
    steps = {group.name: f"{_training(group.runs[0])['tokens_per_step']:,} tokens" for group in groups}
    optimizers = {group.name: _training(group.runs[0])["optimizer"] for group in groups}
    corpora = {group.name: f"corpus {group.runs[0].corpus[:8]}" for group in groups}
    found = {
        "trained on different numbers of tokens; compare their losses at equal cost, not at the end": tokens,
        "trained with optimizer steps of different sizes, so they read the blocks in different batches": steps,
        "trained with different optimizers": optimizers,
        "trained on different text": corpora,
    }
    differences = [
        f"The runs were {what}: {', '.join(f'`{name}` {value}' for name, value in values.items())}."
        for what, values in found.items()
        if len({*values.values()}) > 1
    ]
    return differences + [
        f"`{group.name}` continues the training of `{parent}`; its tokens, FLOPs and time count from the first token. "
        "The part before the branch was computed once for both, and counts once where FLOPs are shared."
        for group in groups
        if (parent := group.runs[0].recipe["students"].get(group.runs[0].name, {}).get("branch_from"))
    ]


def _training(run: Run) -> dict[str, Any]:
    """Return the training settings of a run, of a student or of a teacher."""
    student = run.recipe["students"].get(run.name)
    if student is None:
        return run.recipe["teacher"]["training"]
    return {**run.recipe["training"], **(student.get("training") or {})}


def _grouped(folders: Sequence[Path], runs: Sequence[Run]) -> list[Group]:
    """Group runs that differ only in their seed; groups keep the order of `runs`."""
    members: defaultdict[str, list[int]] = defaultdict(list)
    for index, run in enumerate(runs):
        members[_kind(run)].append(index)
    found = []
    for indices in members.values():
        if len({runs[index].seed for index in indices}) < len(indices):  # repeated runs stay separate
            found += [[index] for index in indices]
        else:
            found.append(sorted(indices, key=lambda index: runs[index].seed))
    names = [runs[indices[0]].name for indices in found]
    apart = portable.short_apart(folders)
    return [
        Group(
            # Folders distinguish groups of the same name from different recipes.
            name if names.count(name) == 1 else apart[indices[0]],
            [runs[index] for index in indices],
            [folders[index] for index in indices],
            _documents([folders[index] for index in indices]),
        )
        for name, indices in sorted(zip(names, found, strict=True), key=lambda item: min(item[1]))
    ]


def _kind(run: Run) -> str:
    recipe = {key: value for key, value in run.recipe.items() if key not in INDEPENDENT_OF_THE_MODEL}
    # Sizes depend on the student that this one is matched to; text can change under the same name.
    outcome = [run.stored_parameters, run.training_flops_per_token, run.teacher_flops_per_token, run.corpus]
    student = {key: value for key, value in run.recipe["students"].get(run.name, {}).items() if value is not None}
    return fingerprint.hash_json([run.name, student, recipe, *outcome])


def _documents(folders: list[Path]) -> list[DocumentLosses] | None:
    found = [load_document_losses(folder) for folder in folders]
    return None if any(each is None for each in found) else [each for each in found if each is not None]


def _label(group: Group, run: Run) -> str:
    return group.name if len(group.runs) == 1 else f"{group.name}, seed {run.seed}"


def _figures(run: Run) -> dict[str, Any]:
    figures = asdict(run)
    del figures["name"], figures["recipe"]
    figures["training_flops"] = run.tokens * run.training_flops_per_token
    return figures
