"""Compare finished runs: losses at equal cost, and the cost at which one reaches another's loss.

Runs of one method that differ in their seed only are one group: its mean is compared, and how it scatters is said.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cocomix import fingerprint, portable
from cocomix.errors import InputError
from cocomix.evaluation.costs import AXES, at_equal_cost, cost_to_reach, losses_of, training_tokens
from cocomix.evaluation.documents import DocumentLosses, PairedDifference, load_document_losses, paired_difference
from cocomix.evaluation.record import load_evaluations
from cocomix.evaluation.seeds import (
    CostDifference,
    Curve,
    SeedDifference,
    cost_difference,
    loss_difference,
    starts_at,
)
from cocomix.evaluation.verdicts import LOSS_MARGIN, verdicts
from cocomix.training.run import Run, load_run

SAME = {"validation": "validation text", "tokenizer": "tokenizer", "block_size": "block size"}
"""What compared runs must have in common."""
NOT_OF_THE_MODEL = ("name", "output", "seed", "seeds", "parallel", "students", "catalog")
"""Recipe keys that may differ between the runs of a group."""


@dataclass(frozen=True)
class Group:
    """One way of training, with one or more seeds.

    Attributes:
        name: what tables call it.
        runs: its runs, by seed.
        folders: where they are.
        documents: their losses by validation document, if all have them.
    """

    name: str
    runs: list[Run]
    folders: list[Path]
    documents: list[DocumentLosses] | None

    @property
    def final_losses(self) -> np.ndarray:
        """(seeds,) validation losses at the end."""
        return np.array([run.metrics["loss"] for run in self.runs])

    @property
    def curves(self) -> list[Curve]:
        """Of each seed, by tokens."""
        return [Curve(training_tokens(run, self.runs), losses_of(run)) for run in self.runs]

    @property
    def mean_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and the mean over seeds of the loss, at each evaluation; their recipes are the same."""
        curves = self.curves
        return curves[0].costs, np.mean([curve.losses for curve in curves], axis=0)


@dataclass(frozen=True)
class Comparison:
    """A group against the baseline.

    Attributes:
        run: name of the group.
        baseline: name of the baseline.
        seeds: of the group and of the baseline.
        loss_difference: mean of run − mean of baseline, nats per token at the end; below 0 is better.
        loss_over_seeds: the same difference seed by seed, with an interval; None unless both have the same seeds, two
            or more.
        documents: the same difference over the validation documents, with an interval; None where not recorded.
        tokens_to_baseline_loss: training tokens at which the group's mean validation curve first reaches the
            baseline's mean final loss; None if it never does.
        tokens_ratio: those tokens as a share of the baseline's.
        tokens_at_most: whether these are upper bounds, because the curve is there by its first evaluation.
        tokens_over_seeds: such a share less 1, each seed against the baseline's of the same seed; None unless both
            have the same seeds, two or more.
        flops_to_baseline_loss: the run's own training FLOPs until then.
        flops_ratio: those FLOPs as a share of the baseline's.
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
    """One group against the baseline."""
    final = float(baseline.final_losses.mean())
    costs, losses = group.mean_curve
    tokens = cost_to_reach(costs, losses, final)
    run, other = group.runs[0], baseline.runs[0]
    flops = None if tokens is None else tokens * run.training_flops_per_token
    paired = None
    if group.documents is not None and baseline.documents is not None:
        counts = [each.tokens for each in (*group.documents, *baseline.documents)]
        if all(np.array_equal(each, counts[0]) for each in counts):  # else equal blocks of other documents
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
    """Comparisons as dictionaries, each with a verdict on its loss over seeds and one over documents.

    A verdict is None where nothing was tested. The verdicts over seeds are corrected for their number, and those over
    documents for theirs.
    """
    by_seeds = [each.loss_over_seeds for each in comparisons]
    by_documents = [each.documents for each in comparisons]
    over_seeds = verdicts([None if found is None else found.test(0.0, LOSS_MARGIN) for found in by_seeds])
    over_documents = verdicts([None if found is None else found.test for found in by_documents])
    return [
        {
            **asdict(each),
            "verdict_over_seeds": None if each.loss_over_seeds is None else str(seeds),
            "verdict_over_documents": None if each.documents is None else str(documents),
        }
        for each, seeds, documents in zip(comparisons, over_seeds, over_documents, strict=True)
    ]


def compare_runs(folders: list[Path]) -> dict[str, Any]:
    """Results of several runs, at equal cost, and each group against the baseline: the first `ntp` one, or the first.

    Raises:
        InputError: a folder without a run, one that is given twice, or runs that were not evaluated on the same
            text with the same tokenizer and block size.
    """
    runs = [load_run(folder) for folder in folders]
    for folder, run in zip(folders[1:], runs[1:], strict=True):
        for key, what in SAME.items():
            if getattr(run, key) != getattr(runs[0], key):
                raise InputError(
                    f"{folder} was evaluated with another {what} than {folders[0]}; losses of these runs cannot be "
                    "compared"
                )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"the same run is given twice: {', '.join(map(str, folders))}")
    groups = _grouped(folders, runs)
    every = [run for group in groups for run in group.runs]
    labels = [_label(group, run) for group in groups for run in group.runs]
    baseline = next((group for group in groups if group.runs[0].method == "ntp"), groups[0])
    equal = {name: at_equal_cost(every, axis) for name, axis in AXES.items()}
    return {
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


def _grouped(folders: Sequence[Path], runs: Sequence[Run]) -> list[Group]:
    """Runs by what they are but for their seed, in the order given."""
    members: defaultdict[str, list[int]] = defaultdict(list)
    for index, run in enumerate(runs):
        members[_kind(run)].append(index)
    found = []
    for indices in members.values():
        if len({runs[index].seed for index in indices}) < len(indices):  # repeats, of other hardware, say
            found += [[index] for index in indices]
        else:
            found.append(sorted(indices, key=lambda index: runs[index].seed))
    names = [runs[indices[0]].name for indices in found]
    apart = portable.short_apart(folders)
    return [
        Group(
            # Of different recipes their folders tell them apart.
            name if names.count(name) == 1 else apart[indices[0]],
            [runs[index] for index in indices],
            [folders[index] for index in indices],
            _documents([folders[index] for index in indices]),
        )
        for name, indices in sorted(zip(names, found, strict=True), key=lambda item: min(item[1]))
    ]


def _kind(run: Run) -> str:
    recipe = {key: value for key, value in run.recipe.items() if key not in NOT_OF_THE_MODEL}
    # What another student, matched to, has made of it; and text that changed under the same name.
    came_out = [run.stored_parameters, run.training_flops_per_token, run.teacher_flops_per_token, run.corpus]
    student = {key: value for key, value in run.recipe["students"].get(run.name, {}).items() if value is not None}
    return fingerprint.hash_json([run.name, student, recipe, *came_out])


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
