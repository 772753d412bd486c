"""Train a sparse autoencoder on a teacher's residual stream.

Interrupted training resumes from the last checkpoint and yields bit-identical weights.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from datasets import Dataset
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.common import distributed, files, integrity
from cocomix.common.console import progress_bar
from cocomix.common.errors import InputError, did_you_mean
from cocomix.common.settings import BlockIndex, Concepts, Count, LearningRate, LossWeight, Range
from cocomix.concepts.activations import ActivationStream
from cocomix.concepts.sae_loading import CONFIG, SAELENS_WEIGHTS
from cocomix.concepts.teacher import freeze
from cocomix.concepts.trainable_sae import InputScaling, StepResult, TrainableSAE, measure_scaling

ARCHITECTURES = ("topk", "batchtopk", "jumprelu")
ONLY_FOR = {
    "k": ("topk", "batchtopk"),
    "l0_coefficient": ("jumprelu",),
    "auxiliary_loss_weight": ("topk", "batchtopk"),
}
"""Settings that apply only to some architectures."""
LEARNING_RATE, BASE_LATENTS = 1e-3, 2048
"""The default learning rate, at this number of latents."""
ADAM_EPSILON = 6.25e-10
"""Adam's ε, as in arXiv 2406.04093: the gradients of rare latents are small."""
SCALING_BATCHES = 50
"""Number of batches on which the scaling of the input is measured."""
CHECKPOINTS = 20
"""Number of checkpoints per training, so an interruption loses at most 5 % of the steps."""
STATE_FILE = "sae_training.pt"


@dataclass
class SAEConfig:
    """The `sae` section of a recipe: the sparse autoencoder whose latents are the concepts.

    The architecture determines how sparsity is enforced. `topk` keeps the k strongest latents of every token.
    `batchtopk` keeps k per token on average, and more for tokens that need more. `jumprelu` learns a threshold for
    each latent and adds up to `l0_coefficient` per active latent to the loss, which is otherwise the squared error
    summed over the teacher's d dimensions (about d if nothing is reconstructed). This penalty rises linearly from 0
    during training. A larger coefficient leaves fewer latents active. How many depends on the teacher, so adjust it
    by the report (0.1 left 17 active at a width of 128).

    Args:
        source: an SAE for `load_sae` to use instead of training one: a folder, `saelens:RELEASE/SAE_ID`, or an OpenAI
            .pt file.
        teacher_layer: 0-based teacher block after which the SAE reads.
        architecture: topk, batchtopk or jumprelu.
        d_sae: C, the number of latents of the trained SAE. With a source, `cocomix plan` uses this and k if the source
            cannot be reached.
        k: number of active latents per token, for topk and batchtopk.
        l0_coefficient: penalty per active latent, for jumprelu.
        auxiliary_loss_weight: weight of the squared error that the strongest dead latents leave when they reconstruct
            what the others left (arXiv 2406.04093, appendix A.2), for topk and batchtopk. It revives dead latents; 0
            turns it off.
        max_active: maximum number of active latents used per token (default 256); ignored by TopK.
        training_tokens: number of activations to train on.
        tokens_per_step: activations per optimizer step.
        learning_rate: Adam's, constant after the warm-up, then linear to 0 over the last fifth. By default
            0.001 · √(2048 / d_sae), because wider SAEs need a lower one (arXiv 2406.04093, appendix A.3).
        buffer_tokens: number of activations that are shuffled together.
    """

    source: str | None = None
    teacher_layer: BlockIndex = 3
    architecture: str = "topk"
    d_sae: Concepts = 2048
    k: Concepts = 32
    l0_coefficient: Annotated[float, Range(0, 10**6, open_low=True)] = 0.1
    auxiliary_loss_weight: LossWeight = 1 / 32
    max_active: Concepts | None = None
    training_tokens: Count = 1_000_000
    tokens_per_step: Count = 2048
    learning_rate: LearningRate | None = None
    buffer_tokens: Count = 65_536

    def problems(self) -> list[str]:
        """List the problems of these settings, one line each."""
        found = self._architecture_problems()
        if self.training_tokens < self.tokens_per_step:
            found.append(f"sae.training_tokens is {self.training_tokens}, less than one step of {self.tokens_per_step}")
        if self.buffer_tokens < self.tokens_per_step:
            found.append(f"sae.buffer_tokens is {self.buffer_tokens}, less than one step of {self.tokens_per_step}")
        return found

    def _architecture_problems(self) -> list[str]:
        if self.architecture not in ARCHITECTURES:
            return [
                f"sae.architecture is {self.architecture!r}; expected one of {', '.join(ARCHITECTURES)}"
                + did_you_mean(self.architecture, ARCHITECTURES)
            ]
        defaults = {setting.name: setting.default for setting in dataclasses.fields(self)}
        found = [
            f"sae.{name} is {getattr(self, name)}, which has no effect with sae.architecture {self.architecture} "
            f"(only with {' and '.join(architectures)}); leave it out"
            for name, architectures in ONLY_FOR.items()
            if self.architecture not in architectures and getattr(self, name) != defaults[name]
        ]
        if self.architecture in ONLY_FOR["k"] and not 1 <= self.k <= self.d_sae:
            found.append(f"sae.k is {self.k}; with sae.d_sae {self.d_sae} it must be 1 to {self.d_sae}")
        return found

    def steps(self) -> int:
        """Return the number of optimizer steps."""
        return self.training_tokens // self.tokens_per_step

    def rate(self) -> float:
        """Return the learning rate between warm-up and decay."""
        return self.learning_rate or LEARNING_RATE * (BASE_LATENTS / self.d_sae) ** 0.5


def train_sae(teacher: PreTrainedModel, blocks: Dataset, config: SAEConfig, folder: Path, seed: int) -> None:
    """Train an SAE and save it to `folder` in SAELens' inference format, in which batchtopk becomes jumprelu.

    Checkpoints are kept in `folder`; call again after an interruption to resume from the last one. The encoder's
    matrix product has the precision of a teacher in bfloat16, everything else is float32. Every rank must call this;
    the ranks share each step, and any number of them can resume a checkpoint.

    Raises:
        InputError: the loss is not finite.
    """
    freeze(teacher)
    torch.manual_seed(seed)
    stream = ActivationStream(
        teacher,
        blocks,
        config.teacher_layer,
        tokens_per_step=config.tokens_per_step,
        buffer_tokens=config.buffer_tokens,
        seed=seed,
    )
    trainer = SAETrainer(teacher, config, stream)
    newest = max(_checkpoints(folder), key=files.step_of, default=None)
    if newest is None:
        trainer.begin()
    else:
        if distributed.is_main_process():
            integrity.verify(newest, f"delete {newest} to train the SAE again")
        distributed.barrier()
        trainer.load_state_dict(torch.load(newest / STATE_FILE, map_location="cpu", weights_only=True))
    _train(trainer, folder)
    if distributed.is_main_process():
        save_sae(trainer.sae, trainer.scaling, config, folder)
    distributed.barrier()


class SAETrainer:
    """The state of a training: SAE, optimizer, scaling of the input, activation stream, and counters."""

    def __init__(self, teacher: PreTrainedModel, config: SAEConfig, stream: ActivationStream) -> None:
        d_in = teacher.config.get_text_config().hidden_size
        self.config, self.stream, self.step = config, stream, 0
        self.sae = TrainableSAE(
            d_in,
            config.d_sae,
            config.architecture,
            k=config.k,
            l0_coefficient=config.l0_coefficient,
            auxiliary_weight=config.auxiliary_loss_weight,
            # The threshold used after training is a running mean that starts at 0.
            threshold_rate=min(1.0, max(0.01, 10 / config.steps())),
            dtype=torch.bfloat16 if teacher.dtype == torch.bfloat16 else torch.float32,
        ).to(teacher.device)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=config.rate(), eps=ADAM_EPSILON, fused=True)
        self.scaling = InputScaling(*torch.zeros(2, d_in, device=teacher.device))
        self.idle = torch.zeros(config.d_sae, dtype=torch.long, device=teacher.device)  # steps since last active
        self.dead_after = max(20, config.steps() // 20)
        self.revives = config.architecture != "jumprelu" and config.auxiliary_loss_weight > 0

    def begin(self) -> None:
        """Measure the scaling of the input on the first batches, and match the encoder to it."""
        self.scaling = measure_scaling(self.stream, min(SCALING_BATCHES, self.config.steps()))
        if self.config.architecture != "jumprelu":
            self.sae.match_scale(self.scaling(next(self.stream)))

    def dead(self) -> Tensor:
        """Return the ids of the latents that have not been active for `dead_after` steps."""
        return (self.idle >= self.dead_after).nonzero().squeeze(-1)

    def run_step(self) -> StepResult:
        """Run one optimizer step, on this rank's share of the batch.

        The gradients are those of the batch up to rounding. Only batchtopk depends on the number of ranks, because it
        chooses the strongest activations of each share.
        """
        steps = self.config.steps()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate() * _schedule(self.step, steps)
        z, dead = self.scaling(next(self.stream)), self.dead()
        if self.revives and len(dead) and self.step % self.dead_after == 0:
            self.sae.revive(z, dead)
        mine = z[distributed.rank() :: distributed.world_size()]
        found = self.sae(mine, dead, self.step / steps)
        found = self._summed(found, len(mine) / len(z))
        self.sae.constrain_gradient()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sae.constrain_weights()
        self.idle = torch.where(found.active > 0, 0, self.idle + 1)
        self.step += 1
        return found

    def _summed(self, found: StepResult, share: float) -> StepResult:
        """Compute the gradients of the batch, and its result, from those of each rank's `share` of it."""
        loss = found.loss * share
        loss.backward()
        loss, unexplained = loss.detach(), found.unexplained * share
        gradients = [parameter.grad for parameter in self.sae.parameters() if parameter.grad is not None]
        means = [buffer.mul_(share) for buffer in self.sae.buffers()]
        distributed.sum_tensors([*gradients, *means, loss, unexplained, found.active])
        return StepResult(loss, unexplained, found.active)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that determines the following steps."""
        return {
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaling": tuple(self.scaling),
            "stream": self.stream.state_dict(),
            "idle": self.idle,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the `state_dict` of a trainer with the same arguments."""
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaling = InputScaling(*(part.to(self.idle.device) for part in state["scaling"]))
        self.stream.load_state_dict(state["stream"])
        self.idle, self.step = state["idle"].to(self.idle.device), state["step"]


def _schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: linear warm-up, constant, and linear to 0 over the last fifth."""
    warm_up, decay = min(100, steps // 20), steps // 5
    return min(1.0, (step + 1) / (warm_up + 1), (steps - step) / (decay + 1))


def _train(trainer: SAETrainer, folder: Path) -> None:
    """Run the remaining steps."""
    config = trainer.config
    steps = config.steps()
    every = max(1, steps // CHECKPOINTS)
    progress = progress_bar(
        total=steps * config.tokens_per_step,
        initial=trainer.step * config.tokens_per_step,
        desc=f"SAE ({config.architecture})",
        unit="tok",
        unit_scale=True,
        disable=not distributed.is_main_process(),
    )
    with progress:
        while trainer.step < steps:
            found = trainer.run_step()
            progress.update(config.tokens_per_step)
            if trainer.step % every == 0 or trainer.step == steps:
                # Only now, because reading a loss synchronizes with the device. A loss that is NaN stays NaN.
                _refuse_divergence(found.loss.item(), trainer)
                progress.set_postfix(
                    unexplained=f"{found.unexplained.item():.3f}",
                    active=f"{found.active.sum().item() / config.tokens_per_step:.1f}",
                    dead=len(trainer.dead()),
                )
                if distributed.is_main_process():
                    _save_checkpoint(trainer, folder)


def _refuse_divergence(loss: float, trainer: SAETrainer) -> None:
    if not math.isfinite(loss):
        distributed.wait_for_main_process()  # which reports it
        raise InputError(
            f"the training of the SAE diverged: after {trainer.step * trainer.config.tokens_per_step} tokens its loss "
            f"is {loss}; lower sae.learning_rate, which is {trainer.config.rate()}"
        )


def save_sae(sae: TrainableSAE, scaling: InputScaling, config: SAEConfig, folder: Path) -> None:
    """Write a trained SAE in SAELens' inference format: `cfg.json` and `sae_weights.safetensors`."""
    is_topk = config.architecture == "topk"
    weights = sae.unscaled(scaling)
    described = {
        "architecture": "topk" if is_topk else "jumprelu",
        "d_in": weights["W_enc"].shape[0],
        "d_sae": config.d_sae,
        **({"k": config.k, "rescale_acts_by_decoder_norm": False} if is_topk else {}),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "hook_name": f"blocks.{config.teacher_layer}.hook_resid_post",
            "training_architecture": config.architecture,
        },
    }
    files.write_bytes(folder / SAELENS_WEIGHTS, save(weights))
    files.write_json(folder / CONFIG, described)


# Checkpoints are folders `checkpoint-STEPS`, written atomically.


def _save_checkpoint(trainer: SAETrainer, folder: Path) -> None:
    """Save the complete training state, and delete older checkpoints."""
    newest = folder / f"checkpoint-{trainer.step}"
    with files.whole_folder(newest) as unfinished:
        torch.save(trainer.state_dict(), unfinished / STATE_FILE)
    for checkpoint in set(files.checkpoints(folder)) - {newest}:
        _discard(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    """List complete checkpoints. Incomplete ones are named `checkpoint-STEPS.partial`; SAELens' have other files."""
    return [found for found in files.checkpoints(folder) if not found.suffix and (found / STATE_FILE).exists()]


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a partly deleted one never looks complete."""
    if not checkpoint.suffix:
        checkpoint = checkpoint.rename(files.partial(checkpoint))
    shutil.rmtree(checkpoint)
