"""Measure how well a run predicts each concept, once, on a sample of its labeled validation blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import numpy as np

from cocomix.common.errors import InputError
from cocomix.evaluation.concepts import ConceptPredictions, concept_predictions
from cocomix.evaluation.prediction import label_tables, training_frequencies
from cocomix.inspection.runs import OpenRun
from cocomix.models.mixer import MixerOutput
from cocomix.pipeline.origins import learned_labels

TOKENS = 16_384
"""Maximum number of tokens to count."""
TOKENS_PER_BATCH = 1024


class Predictability:
    """Counts for all concepts, computed on first use and cached.

    Args:
        run: whose labels are those that it learned (`learned_labels`), if they are still there.
    """

    def __init__(self, run: OpenRun) -> None:
        self.run = run
        self.counting = Lock()
        self.counts: ConceptPredictions | None = None
        self.missing = ""
        """Why there is nothing to count; empty otherwise, and before the first use."""
        self.mixed: list[tuple[np.ndarray, np.ndarray]] = []
        """The concepts that were mixed in at the counted tokens, and their logits, a pair of arrays per batch."""

    @property
    def known(self) -> bool:
        """Whether the result is known without computing."""
        return self.counts is not None or bool(self.missing)

    def count(self) -> ConceptPredictions | None:
        """Return the counts; None if there is nothing to count, with the reason in `missing`."""
        with self.counting:
            if not self.known:
                try:
                    self.counts = self._count()
                except InputError as error:
                    self.missing = f"not known: {error}"
        return self.counts

    def _count(self) -> ConceptPredictions:
        corpus = learned_labels(self.run)
        block_size = corpus.validation.features["input_ids"].length
        blocks = corpus.validation.select(range(min(len(corpus.validation), max(1, TOKENS // block_size))))
        batch_size = max(1, TOKENS_PER_BATCH // block_size)
        tables = label_tables(corpus, self.run.model)
        self.mixed.clear()  # of an attempt that failed
        with self._recording():
            return concept_predictions(self.run.model, blocks, training_frequencies(corpus), tables, batch_size)

    def logits(self, concept: int) -> np.ndarray:
        """Return the logits (N,) of a concept at the N counted tokens where it is mixed in."""
        return np.concatenate([values[indices == concept] for indices, values in self.mixed])

    @property
    def tokens(self) -> int:
        """Number of tokens at which `logits` looks."""
        return sum(indices.shape[0] * indices.shape[1] for indices, _ in self.mixed)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Keep what the model mixes in while this thread reads."""
        reader = get_ident()

        def record(_module: Any, _inputs: Any, output: MixerOutput) -> None:
            if get_ident() == reader:  # not a request that uses the same model
                assert output.active is not None, "a run that is opened mixes concepts"
                values, indices = output.active
                self.mixed.append((indices.int().cpu().numpy(), values.float().cpu().numpy()))

        hook = self.run.model.mixer.register_forward_hook(record)
        try:
            yield
        finally:
            hook.remove()
