"""The thread that runs the model: it batches whatever requests there are, step by step."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from threading import Condition, Thread

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cocomix.inspection.runs import OpenRun
from cocomix.serving.batch import Batch, can_join
from cocomix.serving.rows import Row

ROWS = 32
"""Maximum number of texts that are generated together."""
WAITING = 128
"""Maximum number of texts that wait."""
PROMPT_TOKENS = 4096
"""Number of prompt tokens, with padding, that are read between two steps of the running texts; a longer prompt is read
alone."""


class Busy(Exception):
    """Too many texts wait."""


class Engine:
    """Generates the texts of all requests.

    Args:
        run: run with the model and the tokenizer.
    """

    def __init__(self, run: OpenRun) -> None:
        assert isinstance(run.tokenizer, PreTrainedTokenizerFast)
        self.tokenizer, self.batch = run.tokenizer, Batch(run.model)
        self.rows = ROWS if _joins(self.batch) else 1
        self.waiting: deque[Row] = deque()
        self.changed, self.closed = Condition(), False
        self.thread = Thread(target=self._work, name="engine", daemon=True)
        self.thread.start()

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue texts, all or none. Raises Busy if too many wait."""
        with self.changed:
            if sum(not row.cancelled.is_set() for row in self.waiting) + len(rows) > WAITING:
                raise Busy
            self.waiting.extend(rows)
            self.changed.notify()

    def close(self) -> None:
        """End the thread after the current step."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.waiting or self.batch.rows)
                if self.closed:
                    return
                joining = self._next()
            try:
                self._advance(joining)
            except Exception as error:  # sent to every client that it concerns; the next requests start afresh
                logging.getLogger(__name__).exception("generation failed")
                for row in {*self.batch.rows, *joining}:
                    row.send(error)
                self.batch.keep([])

    def _next(self) -> list[Row]:
        """Take the texts that join in this step from the queue."""
        joining: list[Row] = []
        longest = 0
        while self.waiting and len(self.batch.rows) + len(joining) < self.rows:
            if self.waiting[0].cancelled.is_set():
                self.waiting.popleft()
                continue
            longest = max(longest, len(self.waiting[0].ids))
            if joining and longest * (len(joining) + 1) > PROMPT_TOKENS:
                break
            joining.append(self.waiting.popleft())
        return joining

    def _advance(self, joining: Sequence[Row]) -> None:
        """Generate one token of each text, then let new texts join."""
        self.batch.keep([at for at, row in enumerate(self.batch.rows) if not row.cancelled.is_set()])
        ended = []
        if self.batch.rows:
            logits = self.batch.step()
            best = logits.argmax(-1).tolist()
            ended = [row.advance(logits[at], best[at]) for at, row in enumerate(self.batch.rows)]
        if joining:
            logits = self.batch.join(joining, any(row.needs_prompt_logits for row in joining))
            ended += [row.start(*self._prompt(row, of_row)) for row, of_row in zip(joining, logits, strict=True)]
        self.batch.keep([at for at, end in enumerate(ended) if not end])

    def _prompt(self, row: Row, logits: Tensor) -> tuple[Tensor, str]:
        """Return the logits of a prompt without padding, and its text if the answer begins with it."""
        text = str(self.tokenizer.decode(row.ids, skip_special_tokens=True)) if row.params.echo else ""
        return logits[-len(row.ids) :], text


@torch.no_grad()
def _joins(batch: Batch) -> bool:
    """Find out whether texts can join a running batch of this model, which depends on the layers of its cache."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=batch.model.device)
    return can_join(batch.model(input_ids=ids, use_cache=True).past_key_values)
