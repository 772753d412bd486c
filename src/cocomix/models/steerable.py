"""The steering of a model: for a block of code, for one pass, for a generation.

B sequences, T tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from .steering import PER_ROW, SteeredBatch, as_steering, steer_batch

# Who steers which model now: of each thread and task its own.
_ACTIVE: ContextVar[tuple[tuple[nn.Module, Any], ...]] = ContextVar("steering", default=())
_open_blocks = 0  # in all threads; while there is none, compiled code need not look into a ContextVar, which it cannot
_counting = threading.Lock()


def active_steering(model: nn.Module) -> Any:
    """What the innermost `model.steered(...)` around the caller said; None if there is none."""
    if _open_blocks == 0:
        return None
    return next((steering for steered, steering in reversed(_ACTIVE.get()) if steered is model), None)


class Steerable:
    """The steering of a model whose mixer has concepts."""

    @property
    def mixes_concepts(self: Any) -> bool:
        """Whether concepts are mixed in, which can be steered and traced."""
        return self.config.mixes_concepts

    @contextmanager
    def steered(self: Any, steering: Any) -> Iterator[None]:
        """Within the block, every pass of this model in this thread is steered, unless it is given its own `steering`.

        Args:
            steering: as in `forward`.

        Raises:
            ValueError: it is not for this model.
        """
        global _open_blocks
        self.check_steering(steering)
        with _counting:
            _open_blocks += 1
        before = _ACTIVE.set((*_ACTIVE.get(), (self, steering)))
        try:
            yield
        finally:
            _ACTIVE.reset(before)
            with _counting:
                _open_blocks -= 1

    def check_steering(self: Any, steering: Any) -> None:
        """Raise ValueError unless it is steering for this model; for how many rows, only a pass can tell."""
        if not self.mixes_concepts:
            what = "nothing" if self.config.mixing == "none" else self.config.content
            raise ValueError(f"steering was given, but this model mixes in {what}, and no concepts; leave it out")
        for given in steering if isinstance(steering, PER_ROW) else [steering]:
            for operation in as_steering(given).operations:
                if operation.concept >= self.config.num_concepts:
                    last = self.config.num_concepts - 1
                    raise ValueError(f"no concept {operation.concept} to steer: this model has 0 to {last}")

    def _steered_batch(self: Any, steering: Any, positions: Tensor, batch: int) -> SteeredBatch | None:
        """What `steering`, or else the block around the caller, asks for."""
        if steering is None and (steering := active_steering(self)) is None:
            return None
        self.check_steering(steering)
        return steer_batch(steering, positions, batch)

    def _expand_inputs_for_generation(
        self: Any, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Beams and samples of a row share its steering, and `generated` begins where the row's prompt ends."""
        steering = model_kwargs.pop("steering", None)
        if steering is None:
            steering = active_steering(self)
        if steering is not None:
            self.check_steering(steering)
            ends = model_kwargs["position_ids"].max(-1).values + 1  # ids may be only what a cache does not hold
            lengths = ends.expand(len(input_ids)).tolist()
            rows = list(steering) if isinstance(steering, PER_ROW) else [steering] * len(lengths)
            if len(rows) != len(lengths):
                raise ValueError(f"steering has {len(rows)} entries for {len(lengths)} prompts; give one for each")
            rows = [as_steering(row).after_prompt(length) for row, length in zip(rows, lengths, strict=True)]
            # One for all where they agree costs one operation a step, not one for each row.
            model_kwargs["steering"] = (
                rows[0] if len(set(rows)) == 1 else [row for row in rows for _ in range(expand_size)]
            )
        return super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _get_candidate_generator(self: Any, **kwargs: Any) -> Any:
        """An assistant only proposes, and has other concepts or none: this model's steering is not for it."""
        unsteered = {name: value for name, value in kwargs["model_kwargs"].items() if name != "steering"}
        return super()._get_candidate_generator(**{**kwargs, "model_kwargs": unsteered})  # type: ignore[misc]
