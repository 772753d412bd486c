"""Steering of a model, in one forward pass or throughout a generation.

Dimensions: B sequences, T tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .steering import PER_ROW, SteeredBatch, as_steering, steer_batch


class Steerable:
    """Mixin for models whose mixer predicts concepts, which `steering` changes."""

    @property
    def mixes_concepts(self: Any) -> bool:
        """Whether predicted concepts are mixed in, so that they can be steered and traced."""
        return self.config.mixes_concepts

    def check_steering(self: Any, steering: Any) -> None:
        """Raise ValueError if `steering` does not fit this model. The number of rows is checked in the forward pass."""
        if not self.mixes_concepts:
            what = "nothing" if self.config.mixing == "none" else self.config.content
            raise ValueError(f"steering was given, but this model mixes in {what}, and no concepts; leave it out")
        for given in steering if isinstance(steering, PER_ROW) else [steering]:
            for operation in as_steering(given).operations:
                if operation.concept >= self.config.num_concepts:
                    last = self.config.num_concepts - 1
                    raise ValueError(f"no concept {operation.concept} to steer: this model has 0 to {last}")

    def _steered_batch(self: Any, steering: Any, positions: Tensor, batch: int) -> SteeredBatch | None:
        """Check `steering` and convert it for a batch; None if it changes nothing."""
        if steering is None:
            return None
        self.check_steering(steering)
        return steer_batch(steering, positions, batch)

    def _expand_inputs_for_generation(
        self: Any, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat each row's steering for its beams or samples, and resolve `generated` to start after the prompt."""
        steering = model_kwargs.pop("steering", None)
        if steering is not None:
            self.check_steering(steering)
            ends = model_kwargs["position_ids"].max(-1).values + 1  # input_ids may lack the tokens that a cache holds
            lengths = ends.expand(len(input_ids)).tolist()
            rows = list(steering) if isinstance(steering, PER_ROW) else [steering] * len(lengths)
            if len(rows) != len(lengths):
                raise ValueError(f"steering has {len(rows)} entries for {len(lengths)} prompts; give one for each")
            rows = [as_steering(row).after_prompt(length) for row, length in zip(rows, lengths, strict=True)]
            # Equal rows share one steering, which costs one operation per step instead of one per row.
            model_kwargs["steering"] = (
                rows[0] if len(set(rows)) == 1 else [row for row in rows for _ in range(expand_size)]
            )
        return super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _get_candidate_generator(self: Any, **kwargs: Any) -> Any:
        """Leave the assistant model unsteered: it only proposes tokens, and has other concepts or none."""
        unsteered = {name: value for name, value in kwargs["model_kwargs"].items() if name != "steering"}
        return super()._get_candidate_generator(**{**kwargs, "model_kwargs": unsteered})  # type: ignore[misc]
