"""Muon for the matrices of the decoder blocks, and AdamW for everything else, as one optimizer.

Muon (Jordan et al., 2024) orthogonalizes the momentum of a matrix. As is usual, it takes the hidden matrices only:
embeddings, the token head, and the mixer (whose matrices are the concept head and a table with one row per concept)
stay with AdamW, as do norms, biases and experts stored in one tensor. Its updates are scaled to the size of AdamW's
(Liu et al., arXiv 2502.16982, equation 4), so that learning rate and weight decay carry over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel

OPTIMIZERS = ("adamw", "muon")


def muon_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the matrices that Muon takes, by name: those of the blocks."""
    outside = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outside += [part for part in (model.get_output_embeddings(), getattr(model, "mixer", None)) if part is not None]
    excluded = {id(weight) for module in outside for weight in module.parameters()}
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.dim() == 2 and id(weight) not in excluded
    }


class MuonWithAdamW(Optimizer):
    """Muon on `muon_weights`, and AdamW on the other weights.

    One optimizer with the groups of both, so that schedules, gradient clipping and checkpoints treat it like any other.

    Args:
        model: model to train.
        decayed: names of the weights with weight decay; Muon's all have it.
        weight_decay: weight decay of both.
        lr: learning rate of both.
        adamw: further arguments of AdamW.
    """

    def __init__(
        self, model: PreTrainedModel, decayed: Collection[str], weight_decay: float, lr: float, **adamw: Any
    ) -> None:
        matrices = muon_weights(model)
        rest: dict[bool, list[Tensor]] = {True: [], False: []}  # with and without weight decay
        for name, weight in model.named_parameters():
            if weight.requires_grad and name not in matrices:
                rest[name in decayed].append(weight)
        groups = [{"params": rest[True], "weight_decay": weight_decay}, {"params": rest[False], "weight_decay": 0.0}]
        self._adamw = AdamW(groups, lr=lr, **adamw)
        self._muon = Muon(list(matrices.values()), lr, weight_decay, adjust_lr_fn="match_rms_adamw")
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all weights once."""
        assert closure is None
        for part, is_muon in ((self._muon, True), (self._adamw, False)):
            # Loading a checkpoint replaces groups and state, so both are handed over in every step.
            part.param_groups = [group for group in self.param_groups if ("ns_steps" in group) == is_muon]
            part.state = self.state
            part.step()
