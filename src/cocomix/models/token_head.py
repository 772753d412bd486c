"""The token head of the models of stacks: logits, next-token loss, generation.

Dimensions: B sequences, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn
from transformers import Cache, GenerationMixin

from .cache import StackedCache
from .losses import token_loss
from .next_token_loss import linear_token_loss
from .stacked import StackedModel, StackInputs, adds_to_signature, fill_mask


class HeadInputs(NamedTuple):
    """The arguments of a token head, completed."""

    labels: Tensor | None
    """(B, T) token targets."""
    num_items: Tensor | int | None
    """Number of token targets in the full batch."""
    output_logits: bool
    """Whether to return logits."""
    logits_to_keep: slice | Tensor
    """Index of the positions whose logits are returned."""
    keeps_all_logits: bool
    """Whether these are all positions."""


class StackedForCausalLM(StackedModel, GenerationMixin):
    """A causal language model of stacks."""

    def _add_head(self) -> None:
        """Add the token head, tied to the token embedding if the configuration says so."""
        self.lm_head: nn.Module = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        embedding = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}

    def get_output_embeddings(self) -> nn.Module:
        """Return the token head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the token head."""
        self.lm_head = new_embeddings

    @adds_to_signature(StackedModel.prepare_inputs)
    def prepare(
        self,
        *args: Any,
        labels: Tensor | None = None,
        output_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> tuple[StackInputs, HeadInputs]:
        """Check and complete the arguments of a forward pass.

        Args:
            args: arguments of `StackedModel.prepare_inputs`.
            labels: (B, T) token ids, −100 for no target; the model shifts them.
            output_logits: return the logits. Without them a loss takes less memory and time, because (B, T, V) is
                never materialized.
            logits_to_keep: as in Transformers: the number of last positions, or their indices; 0 for all.
            num_items_in_batch: number of token targets in the full batch of which this is a part. Transformers'
                Trainer passes it.
            kwargs: arguments of `StackedModel.prepare_inputs`.

        Raises:
            TypeError: as `StackedModel.prepare_inputs`.
            ValueError: the same, or `num_items_in_batch` without `labels`.
        """
        inputs = self.prepare_inputs(*args, **kwargs)
        if labels is None and num_items_in_batch is not None:
            raise ValueError(
                "num_items_in_batch was given without labels. Transformers' Trainer removes them for "
                "label_smoothing_factor, which this model does not support (set it to 0), and for compute_loss_func "
                "(set model.accepts_loss_kwargs = False)"
            )
        return inputs, HeadInputs(
            labels=labels,
            num_items=num_items_in_batch,
            output_logits=output_logits,
            logits_to_keep=slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep,
            keeps_all_logits=isinstance(logits_to_keep, int) and logits_to_keep == 0,
        )

    def _logits(self, h: Tensor, head: HeadInputs) -> Tensor | None:
        """(B, T, V) logits of h (B, T, D), or of the positions to keep; None if they are not asked for."""
        return self.lm_head(h[:, head.logits_to_keep]) if head.output_logits else None

    def _token_loss(self, h: Tensor, logits: Tensor | None, head: HeadInputs) -> Tensor | None:
        """Next-token loss of complete logits, else of h (B, T, D) without materializing them; None without labels."""
        if head.labels is None:
            return None
        if logits is not None and head.keeps_all_logits:
            return token_loss(logits, head.labels, head.num_items)
        return linear_token_loss(self.lm_head, h, head.labels, head.num_items)

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache, **kwargs: Any
    ) -> Tensor | None:
        """Prepare the mask for a static cache: only fill it up. Each stack derives its own within the compiled step.

        `generate` calls this in place of Transformers' function of the same name.
        """
        return None if attention_mask is None else fill_mask(attention_mask, past_key_values)

    def _prepare_static_cache(self, cache_implementation: str, max_cache_len: int, **kwargs: Any) -> StackedCache:
        """Create the static cache of `generate`, as long as that of the last call, so that steps stay compiled."""
        if "offloaded" in cache_implementation:
            raise ValueError(
                f"a {type(self).__name__} offloads no static cache; use cache_implementation 'static' or 'offloaded'"
            )
        self._previous_max_cache_length = max(max_cache_len, getattr(self, "_previous_max_cache_length", 0))
        return StackedCache(*self._stacks(), max_tokens=self._previous_max_cache_length)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse paged caches, in which Transformers keeps one entry per token and layer."""
        raise ValueError(
            f"a {type(self).__name__} takes no paged cache, as continuous batching needs; call generate with another "
            "cache_implementation"
        )

    def _get_candidate_generator(self, **kwargs: Any) -> Any:
        """Refuse early exit, for which Transformers would cut the blocks of a single decoder."""
        if kwargs["generation_config"].assistant_early_exit is not None:
            raise ValueError(f"a {type(self).__name__} takes no assistant_early_exit; pass an assistant_model")
        return super()._get_candidate_generator(**kwargs)
