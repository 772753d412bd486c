"""How well a run predicts each concept, counted once over some of its labelled validation blocks."""

from __future__ import annotations

from threading import Lock

from cocomix.concepts.label_store import LABELS_FILE, load_labels
from cocomix.errors import InputError
from cocomix.evaluation.concepts import ConceptPredictions, concept_predictions
from cocomix.evaluation.prediction import training_frequencies
from cocomix.steering.runs import OpenRun

TOKENS = 16_384
"""Counted at most."""
TOKENS_PER_BATCH = 1024


class Predictability:
    """Counts of all concepts, made when they are first asked for and kept.

    Args:
        run: whose labels lie in `labels` of its recipe's output, if anywhere.
    """

    def __init__(self, run: OpenRun) -> None:
        self.run = run
        self.counting = Lock()
        self.counts: ConceptPredictions | None = None
        self.missing = ""
        """Why there is nothing to count; empty if there is something, or nobody has asked yet."""

    @property
    def known(self) -> bool:
        """Whether an answer is there without work."""
        return self.counts is not None or bool(self.missing)

    def count(self) -> ConceptPredictions | None:
        """The counts; None if there is nothing to count, and then `missing` says why."""
        with self.counting:
            if not self.known:
                try:
                    self.counts = self._count()
                except InputError as error:
                    self.missing = str(error)
        return self.counts

    def _count(self) -> ConceptPredictions:
        folder = self.run.folder.absolute().parent.parent / "labels"  # OUTPUT/students/NAME, OUTPUT/labels
        if not (folder / LABELS_FILE).is_file():
            raise InputError("not known: no labels lie beside this run")
        corpus = load_labels(folder)
        if corpus.info.num_concepts != self.run.model.config.num_concepts:
            raise InputError(
                f"not known: the labels beside this run are of {corpus.info.num_concepts:,} other concepts"
            )
        block_size = corpus.validation.features["input_ids"].length
        blocks = corpus.validation.select(range(min(len(corpus.validation), max(1, TOKENS // block_size))))
        batch_size = max(1, TOKENS_PER_BATCH // block_size)
        return concept_predictions(self.run.model, blocks, training_frequencies(corpus), batch_size)
