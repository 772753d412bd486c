"""Train a sparse autoencoder on a teacher's residual stream with SAELens.

Interrupted training resumes from the last checkpoint and yields bit-identical weights.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from cocomix.common import files
from cocomix.common.errors import InputError, did_you_mean
from cocomix.common.integrity import require_readable
from cocomix.common.settings import BlockIndex, Concepts, Count, LearningRate, Range
from cocomix.concepts.activations import ActivationStream
from cocomix.concepts.teacher import freeze

if TYPE_CHECKING:
    from sae_lens import SAETrainer

ARCHITECTURES = ("topk", "batchtopk", "jumprelu")
ONLY_FOR = {"k": ("topk", "batchtopk"), "l0_coefficient": ("jumprelu",)}
"""Settings that apply only to some architectures."""
CHECKPOINTS = 20
"""Number of checkpoints per training, so an interruption loses at most 5 % of the steps."""
STREAM_FILE = "stream.pt"


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
        max_active: maximum number of active latents used per token (default 256); ignored by TopK.
        training_tokens: number of activations to train on.
        tokens_per_step: activations per optimizer step.
        learning_rate: of Adam: constant after the warm-up, then linear to 0 over the last fifth.
        buffer_tokens: number of activations that are shuffled together.
    """

    source: str | None = None
    teacher_layer: BlockIndex = 3
    architecture: str = "topk"
    d_sae: Concepts = 2048
    k: Concepts = 32
    l0_coefficient: Annotated[float, Range(0, 10**6, open_low=True)] = 0.1
    max_active: Concepts | None = None
    training_tokens: Count = 1_000_000
    tokens_per_step: Count = 2048
    learning_rate: LearningRate = 1e-3
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


def require_saelens() -> None:
    """Raise InputError unless SAELens is installed. It is not imported, because that takes seconds."""
    if importlib.util.find_spec("sae_lens") is None:
        raise InputError("training an SAE needs SAELens; install it with: pip install 'cocomix[sae]'")


def train_sae(teacher: PreTrainedModel, blocks: Dataset, config: SAEConfig, folder: Path, seed: int) -> None:
    """Train an SAE and save it to `folder` in SAELens' inference format, in which batchtopk becomes jumprelu.

    The input is scaled to an average norm of √d, measured on the first batches. The scale is folded into the weights
    at the end. Checkpoints are kept in `folder`; call again after an interruption to resume from the last one.

    Raises:
        InputError: SAELens is not installed, or the loss is not finite.
    """
    require_saelens()
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
    trainer = _new_trainer(teacher, config, stream)
    newest = max(_checkpoints(folder), key=_step_of, default=None)
    if newest is None:
        trainer.activation_scaler.estimate_scaling_factor(
            trainer.sae.cfg.d_in, stream, trainer.cfg.n_batches_for_norm_estimate
        )
    else:
        _load_checkpoint(trainer, stream, newest)
    _train(trainer, stream, config, folder)
    trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    trainer.set_final_sae_metadata()
    trainer.sae.save_inference_model(folder)


def _train(trainer: SAETrainer, stream: ActivationStream, config: SAEConfig, folder: Path) -> None:
    """Run the remaining steps.

    `SAETrainer.fit` can also resume, but it writes its checkpoint before it counts the step, so its counter is off by
    one after each resumption. `step` is SAELens' interface for custom loops.
    """
    steps = config.steps()
    every = max(1, steps // CHECKPOINTS)
    progress = tqdm(
        total=steps * config.tokens_per_step,
        initial=trainer.n_training_samples,
        desc=f"SAE ({config.architecture})",
        unit="tok",
        unit_scale=True,
        dynamic_ncols=True,
    )
    with progress:
        while trainer.n_training_steps < steps:
            trainer.maybe_reset_sparsity()
            output = trainer.step(next(stream))
            trainer.n_training_steps += 1
            progress.update(config.tokens_per_step)
            if trainer.n_training_steps % every == 0 or trainer.n_training_steps == steps:
                # Only now, because reading a loss synchronizes with the device. A loss that is NaN stays NaN.
                figures = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
                _refuse_divergence(figures["losses/overall_loss"], trainer, config)
                progress.set_postfix(
                    unexplained=f"{1 - figures['metrics/explained_variance']:.3f}",
                    active=f"{figures['metrics/l0']:.1f}",
                    dead=figures["sparsity/dead_features"],
                )
                _save_checkpoint(trainer, stream, folder)


def _refuse_divergence(loss: float, trainer: SAETrainer, config: SAEConfig) -> None:
    if not math.isfinite(loss):
        raise InputError(
            f"the training of the SAE diverged: after {trainer.n_training_samples} tokens its loss is {loss}; "
            f"lower sae.learning_rate, which is {config.learning_rate}"
        )


def _new_trainer(teacher: PreTrainedModel, config: SAEConfig, stream: ActivationStream) -> SAETrainer:
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig

    steps = config.steps()
    settings = SAETrainerConfig(
        total_training_samples=steps * config.tokens_per_step,
        train_batch_size_samples=config.tokens_per_step,
        lr=config.learning_rate,
        lr_end=config.learning_rate,  # required, but not used by a constant schedule
        lr_warm_up_steps=min(100, steps // 20),
        lr_decay_steps=steps // 5,
        device=str(teacher.device),
        dead_feature_window=max(50, steps // 10),
        n_batches_for_norm_estimate=min(50, steps),
    )
    return SAETrainer(settings, _new_sae(teacher, config), stream)


def _new_sae(teacher: PreTrainedModel, config: SAEConfig) -> Any:
    """Create an untrained SAE of SAELens."""
    import sae_lens

    common = {
        "d_in": teacher.config.get_text_config().hidden_size,
        "d_sae": config.d_sae,
        "normalize_activations": "expected_average_only_in",
        "device": str(teacher.device),
    }
    if config.architecture == "topk":
        sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(k=config.k, **common))
    elif config.architecture == "batchtopk":
        # The threshold used after training is a running mean that starts at 0. In short runs SAELens' default rate
        # of 0.01 per step is too slow for it to converge.
        threshold_rate = min(1.0, max(0.01, 10 / config.steps()))
        sae = sae_lens.BatchTopKTrainingSAE(
            sae_lens.BatchTopKTrainingSAEConfig(k=config.k, topk_threshold_lr=threshold_rate, **common)
        )
    else:
        # Anthropic's settings. SAELens' defaults (DeepMind's) move the thresholds too slowly for runs of a few
        # hundred steps: on a teacher of width 128 they left 130 latents active, and these leave 24.
        sae = sae_lens.JumpReLUTrainingSAE(
            sae_lens.JumpReLUTrainingSAEConfig(
                l0_coefficient=config.l0_coefficient,
                l0_warm_up_steps=config.steps(),
                jumprelu_sparsity_loss_mode="tanh",
                jumprelu_bandwidth=2.0,
                jumprelu_init_threshold=0.1,
                jumprelu_ste_to_input=True,
                pre_act_loss_coefficient=3e-6,
                **common,
            )
        )
    sae.cfg.metadata.hook_name = f"blocks.{config.teacher_layer}.hook_resid_post"
    return sae


# Checkpoints are folders `checkpoint-STEPS`, written atomically.


def _save_checkpoint(trainer: SAETrainer, stream: ActivationStream, folder: Path) -> None:
    """Save the complete training state, and delete older checkpoints."""
    newest = folder / f"checkpoint-{trainer.n_training_steps}"
    with files.whole_folder(newest) as unfinished:
        trainer.sae.save_model(unfinished)
        trainer.save_trainer_state(unfinished)
        state = {"stream": stream.state_dict(), "torch_rng": torch.get_rng_state()}
        torch.save(state, unfinished / STREAM_FILE)
    for checkpoint in set(files.checkpoints(folder)) - {newest}:
        _discard(checkpoint)


def _load_checkpoint(trainer: SAETrainer, stream: ActivationStream, checkpoint: Path) -> None:
    require_readable(checkpoint)
    trainer.sae.load_weights_from_checkpoint(checkpoint)
    trainer.load_trainer_state(checkpoint)
    state = torch.load(checkpoint / STREAM_FILE, map_location="cpu", weights_only=True)
    stream.load_state_dict(state["stream"])
    torch.set_rng_state(state["torch_rng"])


def _checkpoints(folder: Path) -> list[Path]:
    """List complete checkpoints; incomplete ones are named `checkpoint-STEPS.partial`."""
    return [found for found in files.checkpoints(folder) if not found.suffix]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a partly deleted one never looks complete."""
    if not checkpoint.suffix:
        checkpoint = checkpoint.rename(files.partial(checkpoint))
    shutil.rmtree(checkpoint)
