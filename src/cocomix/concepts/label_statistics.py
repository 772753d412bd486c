"""Count the labels of a labeled corpus, in total and per concept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from cocomix.common.console import table
from cocomix.concepts.label_tables import SAMPLE_BLOCKS
from cocomix.data.blocks import Blocks

BLOCKS_AT_ONCE = 256
CURVE_FILE = "concept_frequency.png"


@dataclass(frozen=True)
class LabelStatistics:
    """Counts over all blocks of one split.

    Attributes:
        tokens: number of tokens.
        slots: (A + 1,) number of tokens with 0, 1, … A labels.
        concept_counts: (C,) how often each concept is a label.
    """

    tokens: int
    slots: np.ndarray
    concept_counts: np.ndarray

    def figures(self) -> dict[str, float]:
        """Summarize the counts; shares are between 0 and 1."""
        labels = int(self.concept_counts.sum())
        per_token = len(self.slots) - 1
        ordered = np.sort(self.concept_counts)[::-1]
        share = ordered[ordered > 0] / max(1, labels)
        return {
            "tokens": self.tokens,
            "labels": labels,
            "labels_per_token": labels / self.tokens,
            "labelled_share": 1 - float(self.slots[0]) / self.tokens,
            "fewer_than_all_share": 1 - float(self.slots[per_token]) / self.tokens,
            "concepts": len(ordered),
            "concepts_used_share": float((ordered > 0).mean()),
            "most_frequent_share": float(share[0]) if labels else 0.0,
            # The perplexity of a label: this many equally frequent concepts would be as hard to guess.
            "effective_concepts": float(np.exp(-(share * np.log(share)).sum())) if labels else 0.0,
        }

    def table(self) -> str:
        """Format the figures as a table."""
        figures = self.figures()
        per_token = len(self.slots) - 1
        rows = [
            ["tokens", f"{self.tokens:,}"],
            ["tokens with at least one label", f"{figures['labelled_share']:.2%}"],
            [f"tokens with fewer than {per_token}", f"{figures['fewer_than_all_share']:.2%}"],
            ["labels per token", f"{figures['labels_per_token']:.3f}"],
            ["concepts that are ever a label", f"{figures['concepts_used_share']:.2%} of {figures['concepts']:,}"],
            ["share of the most frequent concept", f"{figures['most_frequent_share']:.2%} of the labels"],
            ["effective number of concepts", f"{figures['effective_concepts']:,.0f}"],
        ]
        return table(["labels", ""], rows)


def label_statistics(blocks: Dataset, num_concepts: int) -> LabelStatistics:
    """Count the labels of blocks with a column `concept_ids` (T, A) in one pass over batches."""
    per_token = blocks.features["concept_ids"].feature.length
    slots, counts = np.zeros(per_token + 1, np.int64), np.zeros(num_concepts, np.int64)
    rows = Blocks(blocks, ["concept_ids"])
    for start in range(0, len(rows), BLOCKS_AT_ONCE):
        ids = rows.batch(start, BLOCKS_AT_ONCE)["concept_ids"].numpy()
        has = ids >= 0
        slots += np.bincount(has.sum(-1).ravel(), minlength=per_token + 1)
        counts += np.bincount(ids[has], minlength=num_concepts)
    return LabelStatistics(int(slots.sum()), slots, counts)


def plot_concept_frequency(statistics: LabelStatistics, path: Path) -> None:
    """Plot how often each concept is a label, most frequent first, to a PNG file."""
    from matplotlib.figure import Figure

    ordered = np.sort(statistics.concept_counts)[::-1]
    used = ordered[ordered > 0] / max(1, statistics.tokens)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(np.arange(1, len(used) + 1), used)
    axes.set_xlabel("concepts, most frequent first")
    axes.set_ylabel("share of tokens labeled with it")
    never = len(ordered) - len(used)
    axes.set_title(f"{len(used):,} of {len(ordered):,} concepts are labels, {never:,} never", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)


def label_frequencies(blocks: Dataset, num_concepts: int) -> np.ndarray:
    """Return the share (C,) of labeled tokens with each concept as a label, in the first `SAMPLE_BLOCKS` blocks."""
    found = label_statistics(blocks.select(range(min(SAMPLE_BLOCKS, len(blocks)))), num_concepts)
    return found.concept_counts / max(1, int(found.slots[1:].sum()))
