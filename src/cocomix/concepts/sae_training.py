"""Train a sparse autoencoder on a teacher's residual stream, with SAELens.

N tokens, d teacher width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from cocomix.concepts.sae import SparseAutoencoder, load_sae
from cocomix.concepts.teacher import freeze, loss_with_residual, residual_stream
from cocomix.errors import InputError


@dataclass
class SAEConfig:
    """The sparse autoencoder whose latents are the concepts.

    Args:
        source: a SAELens folder or an OpenAI .pt file, instead of training one.
        teacher_layer: 0-based teacher block after which it reads.
        d_sae: C, latents of the trained SAE.
        k: latents that it keeps per token.
        training_tokens: activations that it is trained on.
        tokens_per_step: activations of one optimiser step.
        learning_rate: Adam's, constant after the warm-up, then linear to 0 over the last fifth.
        buffer_tokens: activations that are shuffled together.
    """

    source: str | None = None
    teacher_layer: int = 3
    d_sae: int = 2048
    k: int = 32
    training_tokens: int = 1_000_000
    tokens_per_step: int = 2048
    learning_rate: float = 1e-3
    buffer_tokens: int = 65_536

    def problems(self) -> list[str]:
        """What cannot work about these settings, a line each."""
        found = [
            f"sae.{name} is {getattr(self, name)}; expected 1 or more"
            for name in ("training_tokens", "tokens_per_step", "buffer_tokens")
            if getattr(self, name) < 1
        ]
        if not 1 <= self.k <= self.d_sae:
            found.append(f"sae.k is {self.k}; with sae.d_sae {self.d_sae} it must be 1 to {self.d_sae}")
        if self.training_tokens < self.tokens_per_step:
            found.append(f"sae.training_tokens is {self.training_tokens}, less than one step of {self.tokens_per_step}")
        if self.buffer_tokens < self.tokens_per_step:
            found.append(f"sae.buffer_tokens is {self.buffer_tokens}, less than one step of {self.tokens_per_step}")
        return found


@dataclass(frozen=True)
class SAEQuality:
    """How well an SAE stands in for the residual stream, on validation text.

    Attributes:
        fraction_variance_unexplained: Σ|x − x̃|² / Σ|x − mean x|².
        dead_share: share of latents that were never active on `tokens` tokens.
        mean_active: active latents per token (L0).
        teacher_loss: nats per token, the residual stream as it is.
        spliced_loss: the same with x̃ in place of x.
        zero_loss: the same with 0 in place of x.
        loss_recovered: (zero − spliced) / (zero − clean).
        tokens: validation tokens measured on.
    """

    fraction_variance_unexplained: float
    dead_share: float
    mean_active: float
    teacher_loss: float
    spliced_loss: float
    zero_loss: float
    loss_recovered: float
    tokens: int


def activations(
    teacher: PreTrainedModel, blocks: Dataset, layer: int, blocks_per_batch: int, seed: int
) -> Iterator[Tensor]:
    """Residual streams (N, d) of blocks in a shuffled order, round after round without end."""
    order = np.random.default_rng(seed)
    rows = blocks.with_format("numpy")
    while True:
        shuffled = order.permutation(len(rows))
        for start in range(0, len(shuffled), blocks_per_batch):
            ids = rows[shuffled[start : start + blocks_per_batch]]["input_ids"].astype(np.int64)
            x = residual_stream(teacher, torch.from_numpy(ids).to(teacher.device), layer)
            yield x.flatten(0, 1).float()


def require_saelens() -> None:
    """Raise InputError unless SAELens is installed; it is not imported, which takes seconds."""
    if importlib.util.find_spec("sae_lens") is None:
        raise InputError("training an SAE needs SAELens; install it with: pip install 'cocomix[sae]'")


def train_sae(
    teacher: PreTrainedModel, blocks: Dataset, config: SAEConfig, folder: Path, seed: int
) -> SparseAutoencoder:
    """Train a TopK SAE and save it to `folder` in SAELens' form.

    Its input is scaled to the norm √d on average, and the scale is folded into the weights at the end.

    Raises:
        InputError: SAELens is not installed.
    """
    require_saelens()
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.mixing_buffer import mixing_buffer

    freeze(teacher)
    torch.manual_seed(seed)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=teacher.config.get_text_config().hidden_size,
            d_sae=config.d_sae,
            k=config.k,
            normalize_activations="expected_average_only_in",
            device=str(teacher.device),
        )
    )
    steps = config.training_tokens // config.tokens_per_step
    block_size = len(blocks[0]["input_ids"])
    per_batch = max(1, config.tokens_per_step // block_size)
    stream = activations(teacher, blocks, config.teacher_layer, per_batch, seed)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * config.tokens_per_step,
            train_batch_size_samples=config.tokens_per_step,
            lr=config.learning_rate,
            lr_end=config.learning_rate / 10,
            lr_warm_up_steps=min(100, steps // 20),
            lr_decay_steps=steps // 5,
            device=str(teacher.device),
            dead_feature_window=max(50, steps // 10),
            n_batches_for_norm_estimate=min(50, steps),
        ),
        sae,
        mixing_buffer(config.buffer_tokens, config.tokens_per_step, stream),
    )
    trainer.fit().save_inference_model(str(folder))
    return load_sae(folder)


@torch.no_grad()
def sae_quality(
    teacher: PreTrainedModel, sae: SparseAutoencoder, blocks: Dataset, layer: int, blocks_per_batch: int
) -> SAEQuality:
    """Measure an SAE on `blocks`, all of them."""
    freeze(teacher)
    rows = blocks.with_format("numpy")
    errors, active, tokens, targets = 0.0, 0, 0, 0
    total, squares = torch.zeros(sae.d_in, dtype=torch.float64), 0.0
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    losses = {"teacher_loss": 0.0, "spliced_loss": 0.0, "zero_loss": 0.0}
    replacements: dict[str, Callable[[Tensor], Tensor]] = {
        "teacher_loss": lambda x: x,
        "spliced_loss": sae.reconstruct,
        "zero_loss": torch.zeros_like,
    }
    for start in tqdm(range(0, len(rows), blocks_per_batch), desc="SAE quality", unit="batch", leave=False):
        ids = torch.from_numpy(rows[start : start + blocks_per_batch]["input_ids"].astype(np.int64))
        ids = ids.to(teacher.device)
        x = residual_stream(teacher, ids, layer)
        latents = sae.encode(x)
        errors += (x - sae.reconstruct(x)).double().square().sum().item()
        total += x.double().sum((0, 1)).cpu()
        squares += x.double().square().sum().item()
        is_active = latents.values > 0
        active += int(is_active.sum())
        fired[latents.indices[is_active].cpu()] = True
        tokens += ids.numel()
        targets += ids[:, 1:].numel()
        for name, replace in replacements.items():
            losses[name] += loss_with_residual(teacher, ids, layer, replace).item()
    variance = squares - (total.square().sum() / tokens).item()
    means = {name: value / targets for name, value in losses.items()}
    return SAEQuality(
        fraction_variance_unexplained=errors / variance,
        dead_share=1 - fired.float().mean().item(),
        mean_active=active / tokens,
        loss_recovered=(means["zero_loss"] - means["spliced_loss"]) / (means["zero_loss"] - means["teacher_loss"]),
        tokens=tokens,
        **means,
    )
