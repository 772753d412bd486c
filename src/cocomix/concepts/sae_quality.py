"""Measure on validation text how well a sparse autoencoder reconstructs a teacher's residual stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.common import files
from cocomix.common.console import progress_bar
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.teacher import freeze, loss_with_residual

EVALUATION_TOKENS = 300_000
"""Maximum number of validation tokens. A latent that is active at one token in 50,000 is then counted as dead with a
probability of only e^-6 = 0.2 %."""
QUALITY_FILE, HISTOGRAM_FILE = "quality.json", "latent_frequency.png"
MANY_DEAD, LITTLE_RECOVERED, MUCH_UNEXPLAINED = 0.5, 0.9, 0.5
"""Limits beyond which `quality_warnings` warns."""


@dataclass(frozen=True)
class SAEQuality:
    """Quality of an SAE.

    Attributes:
        fraction_variance_unexplained: Σ|x − x̃|² / Σ|x − mean x|².
        dead_share: share of latents that were never active on `tokens` tokens.
        mean_active: mean number of active latents per token (L0).
        teacher_loss: loss of the unchanged teacher, in nats per token.
        spliced_loss: the same with x̃ in place of x.
        zero_loss: the same with 0 in place of x.
        loss_recovered: (zero − spliced) / (zero − teacher); 0 if zero ablation does not raise the loss.
        tokens: number of validation tokens.
        dimension_variance_unexplained: mean over the d dimensions of each one's fraction of variance unexplained. In
            the first figure, a few massive dimensions can hold nearly all of the variance and hide the others; here
            every dimension counts alike. None in older records.
    """

    fraction_variance_unexplained: float
    dead_share: float
    mean_active: float
    teacher_loss: float
    spliced_loss: float
    zero_loss: float
    loss_recovered: float
    tokens: int
    dimension_variance_unexplained: float | None = None


class MeasuredSAE(NamedTuple):
    """Results of `sae_quality`."""

    quality: SAEQuality
    frequency: Tensor
    """(d_sae,) share of tokens at which each latent is active, float64."""


class _Splice:
    """Replace x (B, T, d) by x̃, and accumulate statistics of both."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae
        self.tokens = 0
        # Of each dimension, (d,).
        self.squared_error, self.squares, self.total = torch.zeros(3, sae.d_in, dtype=torch.float64)
        self.active = torch.zeros(sae.d_sae, dtype=torch.int64)

    def __call__(self, x: Tensor) -> Tensor:
        latents = self.sae.encode(x)
        reconstruction = self.sae.decode(latents, x)
        self.tokens += x[..., 0].numel()
        wide = x.double()
        self.squared_error += (wide - reconstruction.double()).square().sum((0, 1)).cpu()
        self.squares += wide.square().sum((0, 1)).cpu()
        self.total += wide.sum((0, 1)).cpu()
        self.active += torch.bincount(latents.indices[latents.values > 0], minlength=self.sae.d_sae).cpu()
        return reconstruction

    def unexplained(self) -> tuple[float, float]:
        """Return Σ|x − x̃|² / Σ|x − mean x|² over all dimensions, and the mean of the same of each dimension.

        Where x is constant, this is 0 for an exact reconstruction, else 1.
        """
        variance = self.squares - self.total.square() / self.tokens
        each = torch.where(variance > 0, self.squared_error / variance, (self.squared_error > 0).double())
        total = variance.sum().item()
        error = self.squared_error.sum().item()
        return error / total if total > 0 else float(error > 0), each.mean().item()


@torch.no_grad()
def sae_quality(
    teacher: PreTrainedModel, sae: SparseAutoencoder, blocks: Dataset, layer: int, blocks_per_batch: int
) -> MeasuredSAE:
    """Measure an SAE on the first `EVALUATION_TOKENS` tokens of `blocks`, with forward passes of x, x̃, and 0."""
    freeze(teacher)
    rows = blocks.with_format("numpy")
    wanted = min(len(rows), -(-EVALUATION_TOKENS // len(rows[0]["input_ids"])))
    splice, targets = _Splice(sae), 0
    replacements: dict[str, Callable[[Tensor], Tensor]] = {
        "teacher_loss": lambda x: x,
        "spliced_loss": splice,
        "zero_loss": torch.zeros_like,
    }
    sums = dict.fromkeys(replacements, 0.0)
    for start in progress_bar(range(0, wanted, blocks_per_batch), desc="SAE quality", unit="batch", leave=False):
        ids = torch.from_numpy(rows[start : min(start + blocks_per_batch, wanted)]["input_ids"].astype(np.int64))
        ids = ids.to(teacher.device)
        targets += ids[:, 1:].numel()
        for name, replace in replacements.items():
            sums[name] += loss_with_residual(teacher, ids, layer, replace).item()
    losses = {name: total / targets for name, total in sums.items()}
    recoverable = losses["zero_loss"] - losses["teacher_loss"]
    unexplained, dimension_unexplained = splice.unexplained()
    quality = SAEQuality(
        fraction_variance_unexplained=unexplained,
        dead_share=(splice.active == 0).double().mean().item(),
        mean_active=splice.active.sum().item() / splice.tokens,
        loss_recovered=(losses["zero_loss"] - losses["spliced_loss"]) / recoverable if recoverable > 0 else 0.0,
        tokens=splice.tokens,
        dimension_variance_unexplained=dimension_unexplained,
        **losses,
    )
    return MeasuredSAE(quality, splice.active.double() / splice.tokens)


def quality_warnings(quality: Mapping[str, Any]) -> list[str]:
    """Return a line for each figure of a recorded `SAEQuality` that is poor: what it means and what to change."""
    found = []
    if quality["dead_share"] > MANY_DEAD:
        found.append(
            f"{quality['dead_share']:.0%} of the SAE's latents are dead, so most concepts are never a label; lower "
            "sae.d_sae, or raise sae.training_tokens"
        )
    if quality["loss_recovered"] < LITTLE_RECOVERED:
        found.append(
            f"the SAE's reconstruction recovers {quality['loss_recovered']:.1%} of the teacher's loss, so the concepts "
            "miss much of what the teacher uses; raise sae.training_tokens, sae.k or sae.d_sae, or tap another block "
            "(sae.teacher_layer)"
        )
    # Missing in older records.
    unexplained = max(quality["fraction_variance_unexplained"], quality.get("dimension_variance_unexplained") or 0.0)
    if unexplained > MUCH_UNEXPLAINED:
        found.append(
            f"the SAE leaves {unexplained:.0%} of the variance of the teacher's activations unexplained, so it does "
            "not fit them; with sae.source, check that it was trained on this teacher and this sae.teacher_layer; "
            "otherwise raise sae.training_tokens"
        )
    return found


def write_quality(measured: MeasuredSAE, folder: Path) -> None:
    """Write the figures and the histogram of latent frequencies into `folder`."""
    files.write_json(folder / QUALITY_FILE, dataclasses.asdict(measured.quality))
    plot_frequencies(measured, folder / HISTOGRAM_FILE)


def plot_frequencies(measured: MeasuredSAE, path: Path) -> None:
    """Plot a histogram of how often latents are active, on a logarithmic axis with a separate bar for dead latents."""
    from matplotlib.figure import Figure

    quality = measured.quality
    alive = measured.frequency[measured.frequency > 0].log10().numpy()
    dead = len(measured.frequency) - len(alive)
    # Each bar spans a quarter of a decade. The lowest observable frequency is once in all tokens.
    least = np.floor(-np.log10(quality.tokens) * 4) / 4
    edges = np.arange(least, 0.01, 0.25)
    in_range = alive.clip(edges[0], edges[-1])  # so that rounding does not drop the rarest
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.hist(
        in_range, edges.tolist(), color="tab:blue", edgecolor="white", label=f"active at least once: {len(alive):,}"
    )
    if dead:
        bar = axes.bar(least - 0.5, dead, 0.25, color="tab:red", label=f"dead (never active): {dead:,}")
        axes.bar_label(bar, labels=[f"{dead:,}"], padding=2)
    if len(alive):
        median = float(np.median(alive))
        axes.axvline(median, color="black", linestyle="--", linewidth=1, label=f"median of these: {_one_in(median)}")
    powers = list(range(int(np.ceil(least)), 1))
    axes.set_xticks([least - 0.5, *powers] if dead else powers, ["dead"] * bool(dead) + [_one_in(p) for p in powers])
    axes.set(xlabel="tokens at which a latent is active (log scale)", ylabel="number of latents")
    axes.set_title(
        f"{len(measured.frequency):,} latents on {quality.tokens:,} tokens: {quality.dead_share:.1%} dead, "
        f"{quality.mean_active:.1f} active per token"
    )
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend()
    figure.savefig(path)


def _one_in(log10_frequency: float) -> str:
    """Format a frequency as "1 in N"."""
    return "every token" if log10_frequency >= 0 else f"1 in {10**-log10_frequency:,.0f}"
