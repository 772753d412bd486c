"""Stream a plain and a steered continuation of one prompt, token by token.

Both are rows of one batch, so they cost one generation, stay synchronized, and differ only by their steering: with
sampling, both use the same random numbers. No global state is used, so requests in several threads do not interfere:
the steering is an argument of `generate`, and each request has its own random generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from queue import Queue
from threading import Event, Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from cocomix.inspection.generation import GenerationSettings, prompt_ids
from cocomix.inspection.runs import OpenRun
from cocomix.inspection.sampling import GumbelSampling, continuation
from cocomix.models.steering import Steering


class Continuations(NamedTuple):
    """Both texts so far."""

    plain: str
    """The text without steering."""
    steered: str
    """The text with steering."""
    tokens: int
    """Length of the longer text."""
    end: str
    """Why the generation ended; empty while it is running."""


class _Stopped(StoppingCriteria):
    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **_kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class _Tokens(BaseStreamer):
    """Put the new tokens of all rows into a queue; the streamers of Transformers support only one row."""

    def __init__(self, queue: Queue[list[int] | BaseException | None]) -> None:
        self.queue, self.after_prompt = queue, False

    def put(self, value: Tensor) -> None:
        if self.after_prompt:
            self.queue.put(value.tolist())
        self.after_prompt = True

    def end(self) -> None:
        pass


def generate_both(
    run: OpenRun, prompt: str, settings: GenerationSettings, steering: Steering, seconds: float
) -> Iterator[Continuations]:
    """Yield the texts after each new token, and once more at the end. Closing the iterator stops the generation.

    Args:
        run: run with the model.
        prompt: beginning of both texts.
        settings: settings with one sample and no beams.
        steering: steering of the second text.
        seconds: time limit.

    Raises:
        InputError: the prompt is empty, or leaves no room in the model's context.
        ValueError: the steering does not fit this model.
    """
    assert settings.num_beams == settings.num_samples == 1
    run.model.check_steering(steering)
    inputs = prompt_ids(run, prompt, settings.max_new_tokens).expand(2, -1)
    beginning = inputs[0].tolist()
    tokens: Queue[list[int] | BaseException | None] = Queue()
    stopped = Event()
    sampling = [GumbelSampling(settings.temperature, settings.top_p, settings.seed)] if settings.temperature else []

    def work() -> None:
        try:
            run.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                steering=[Steering(), steering],
                max_new_tokens=settings.max_new_tokens,
                do_sample=False,
                pad_token_id=run.tokenizer.eos_token_id,
                logits_processor=LogitsProcessorList(sampling),
                stopping_criteria=StoppingCriteriaList([_Stopped(stopped), MaxTimeCriteria(seconds)]),
                streamer=_Tokens(tokens),
            )
            tokens.put(None)
        except BaseException as error:  # passed to the waiting thread
            tokens.put(error)

    worker = Thread(target=work, daemon=True)
    worker.start()
    rows: tuple[list[int], list[int]] = ([], [])
    try:
        while (found := tokens.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            for row, token in zip(rows, found, strict=True):
                row.append(token)
            # The last character may be completed by the next tokens.
            plain, steered = (continuation(run.tokenizer, beginning, row).rstrip("\ufffd") for row in rows)
            yield Continuations(plain, steered, len(rows[0]), "")
        plain, steered = (continuation(run.tokenizer, beginning, row) for row in rows)
        yield Continuations(plain, steered, len(rows[0]), _end(run, rows, settings, seconds))
    finally:
        stopped.set()
        worker.join()


def _end(run: OpenRun, rows: tuple[list[int], ...], settings: GenerationSettings, seconds: float) -> str:
    if len(rows[0]) == settings.max_new_tokens:
        return f"{settings.max_new_tokens} new tokens"
    if all(run.tokenizer.eos_token_id in row for row in rows):
        return "both texts ended"
    return f"stopped at the time limit of {seconds:g} seconds"
