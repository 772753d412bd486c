"""Sizes of a recipe's models: read from their sources if these are reachable, otherwise as the recipe states them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cocomix.common.errors import InputError, UnreachableError
from cocomix.concepts.label_store import read_labels_info
from cocomix.concepts.sae import MAX_ACTIVE, SparseAutoencoder
from cocomix.concepts.sae_loading import REGISTRY, load_sae, published_sizes
from cocomix.concepts.sae_training import SAEConfig
from cocomix.concepts.teacher import freeze
from cocomix.data.tokenizer import TokenizerConfig, load_tokenizer, vocabulary_size
from cocomix.models.building import BackboneConfig, backbone_config
from cocomix.models.loading import load_config
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.recipe import Recipe

T = TypeVar("T")
HUB_SECONDS = 5


class SAESizes(NamedTuple):
    """The sizes that determine an SAE's cost."""

    d_in: int
    """Width of the input activations."""
    d_sae: int
    """C, number of latents."""
    active: int
    """Active latents per token."""


class PlannedPipeline(Pipeline):
    """A recipe's pipeline whose teacher and SAE have sizes but no weights.

    Attributes:
        remarks: sentences about sizes that were assumed, or that differ from those in the recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.device = torch.device("cpu")
        self.remarks: list[str] = []

    @cached_property
    def vocab_size(self) -> int:
        """Vocabulary size of the students."""
        if self.corpus_stage.is_done():
            return self.corpus().info.vocab_size
        tokenizer = self.recipe.tokenizer
        stated = tokenizer.vocab_size
        if tokenizer.source is None:
            return stated
        source = tokenizer.source
        found = self._read_source(source, lambda: vocabulary_size(load_tokenizer(source)))
        return self._checked(found, stated, stated != TokenizerConfig().vocab_size, source, "tokenizer.vocab_size")

    @cached_property
    def teacher_model_config(self) -> PretrainedConfig:
        """Configuration of the teacher."""
        teacher = self.recipe.teacher
        own = backbone_config(
            teacher.backbone, vocab_size=self.vocab_size, block_size=self.recipe.block_size, eos_token_id=0
        )
        if teacher.source is None:
            return own
        source = teacher.source
        found = self._read_source(source, lambda: load_config(source).get_text_config())
        is_stated = teacher.backbone != BackboneConfig()
        return self._checked(found, own, is_stated, source, "teacher.backbone", size_of=_weights_of)

    @cached_property
    def sae_sizes(self) -> SAESizes:
        """Sizes of the SAE."""
        sae, width = self.recipe.sae, self.teacher_model_config.hidden_size
        active = sae.k if sae.architecture != "jumprelu" else sae.max_active or MAX_ACTIVE
        own = SAESizes(width, sae.d_sae, active)
        if sae.source is None:
            return own
        source = sae.source

        def opened() -> SAESizes:
            if source.startswith(REGISTRY):
                return SAESizes(*published_sizes(source, sae.max_active))
            loaded = load_sae(source, sae.max_active)
            return SAESizes(loaded.d_in, loaded.d_sae, loaded.max_active)

        found = self._read_source(source, opened)
        is_stated = sae.d_sae != SAEConfig().d_sae
        return self._checked(found, own, is_stated, source, "sae.d_sae and sae.k")

    @property
    def num_concepts(self) -> int:
        """Number of concepts in the labels."""
        if not self.recipe.needs_labels():
            return 0
        if self.recipe.labels.source is not None:
            return read_labels_info(self.labels_folder()).num_concepts
        return self.sae_sizes.d_sae

    @property
    def teacher_hidden_size(self) -> int:
        """Width of the teacher's residual stream."""
        return self.teacher_model_config.hidden_size

    def teacher(self) -> PreTrainedModel:
        """Build a frozen teacher; the caller sets the meta device or fake tensors."""
        return freeze(AutoModelForCausalLM.from_config(self.teacher_model_config, dtype=self.teacher_dtype))

    @property
    def teacher_dtype(self) -> torch.dtype:
        """Precision of the teacher's weights."""
        return self.recipe.teacher.dtype() or self.teacher_model_config.dtype or torch.float32

    def sae(self) -> SparseAutoencoder:
        """Build an SAE in the same way. It is a top-k SAE, which costs at least as much as the other architectures."""
        d_in, d_sae, active = self.sae_sizes
        return SparseAutoencoder(
            W_enc=torch.empty(d_in, d_sae),
            b_enc=torch.empty(d_sae),
            W_dec=torch.empty(d_sae, d_in),
            b_dec=torch.empty(d_in),
            k=active,
        )

    def _read_source(self, source: str, read: Callable[[], T]) -> T | None:
        """Return the result of `read`; None if it needs a hub that cannot be reached."""
        with _offline(not Path(source).exists() and not self._hub_answers):
            try:
                return read()
            except UnreachableError:
                return None

    @cached_property
    def _hub_answers(self) -> bool:
        """Whether the hub responds. Checked once, because the hub's library retries for half a minute each time."""
        if constants.HF_HUB_OFFLINE:
            return False
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
        except Exception:  # exceptions of several libraries
            return False
        return True

    def _checked(
        self,
        found: T | None,
        stated: T,
        is_stated: bool,
        source: str,
        keys: str,
        size_of: Callable[[T], object] = lambda found: found,
    ) -> T:
        """Return the sizes to plan with: those of the source, otherwise the stated ones. Remarks on a difference."""
        if found is None:
            if not is_stated:
                raise InputError(
                    f"{source} cannot be reached, and the recipe does not state its sizes; set {keys} as well"
                )
            self.remarks.append(f"{source} was not reached; the plan uses the sizes in the recipe ({keys})")
            return stated
        if is_stated and size_of(found) != size_of(stated):
            self.remarks.append(f"{keys} in the recipe differs from {source}; the plan uses the sizes of {source}")
        return found


def _weights_of(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Disable access to the hub inside the context, if `wanted`."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
