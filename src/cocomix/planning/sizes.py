"""The sizes of what a recipe names: from its source where that can be reached, else as the recipe states them."""

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

from cocomix.concepts.label_store import read_labels_info
from cocomix.concepts.sae import MAX_ACTIVE, SparseAutoencoder
from cocomix.concepts.sae_loading import REGISTRY, load_sae, published_sizes
from cocomix.concepts.sae_training import SAEConfig
from cocomix.concepts.teacher import freeze
from cocomix.data.tokenizer import TokenizerConfig, load_tokenizer, vocabulary_size
from cocomix.errors import InputError, UnreachableError
from cocomix.models.building import BackboneConfig, backbone_config
from cocomix.models.loading import load_config
from cocomix.pipeline import Pipeline
from cocomix.recipe import Recipe

T = TypeVar("T")
HUB_SECONDS = 5


class SAESizes(NamedTuple):
    """What an SAE's cost depends on."""

    d_in: int
    """Width of the activations that it reads."""
    d_sae: int
    """C, latents."""
    active: int
    """Latents kept per token."""


class PlannedPipeline(Pipeline):
    """A recipe's pipeline whose teacher and SAE have sizes and no weights.

    Attributes:
        remarks: what was taken from elsewhere than its source, or is not what the recipe states; for a person.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.device = torch.device("cpu")
        self.remarks: list[str] = []

    @cached_property
    def vocab_size(self) -> int:
        """V, of the students."""
        if self.corpus_stage.is_done():
            return self.corpus().info.vocab_size
        tokenizer = self.recipe.tokenizer
        stated = tokenizer.vocab_size
        if tokenizer.source is None:
            return stated
        source = tokenizer.source
        found = self._of_source(source, lambda: vocabulary_size(load_tokenizer(source)))
        return self._checked(found, stated, stated != TokenizerConfig().vocab_size, source, "tokenizer.vocab_size")

    @cached_property
    def teacher_model_config(self) -> PretrainedConfig:
        """The teacher's configuration."""
        teacher = self.recipe.teacher
        own = backbone_config(
            teacher.backbone, vocab_size=self.vocab_size, block_size=self.recipe.block_size, eos_token_id=0
        )
        if teacher.source is None:
            return own
        source = teacher.source
        found = self._of_source(source, lambda: load_config(source).get_text_config())
        is_stated = teacher.backbone != BackboneConfig()
        return self._checked(found, own, is_stated, source, "teacher.backbone", size_of=_weights_of)

    @cached_property
    def sae_sizes(self) -> SAESizes:
        """The SAE's sizes."""
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

        found = self._of_source(source, opened)
        is_stated = sae.d_sae != SAEConfig().d_sae
        return self._checked(found, own, is_stated, source, "sae.d_sae and sae.k")

    @property
    def num_concepts(self) -> int:
        """C, of the labels."""
        if not self.recipe.needs_labels():
            return 0
        if self.recipe.labels.source is not None:
            return read_labels_info(self.labels_folder()).num_concepts
        return self.sae_sizes.d_sae

    @property
    def teacher_hidden_size(self) -> int:
        """d, of the teacher's residual stream."""
        return self.teacher_model_config.hidden_size

    def teacher(self) -> PreTrainedModel:
        """The frozen teacher, made anew where the caller says: on the meta device, or of fake tensors."""
        return freeze(AutoModelForCausalLM.from_config(self.teacher_model_config, dtype=self.teacher_dtype))

    @property
    def teacher_dtype(self) -> torch.dtype:
        """Of the running teacher's weights."""
        return self.recipe.teacher.dtype() or self.teacher_model_config.dtype or torch.float32

    def sae(self) -> SparseAutoencoder:
        """The SAE, likewise; one that keeps its strongest latents, which is what any costs at most."""
        d_in, d_sae, active = self.sae_sizes
        return SparseAutoencoder(
            W_enc=torch.empty(d_in, d_sae),
            b_enc=torch.empty(d_sae),
            W_dec=torch.empty(d_sae, d_in),
            b_dec=torch.empty(d_in),
            k=active,
        )

    def _of_source(self, source: str, read: Callable[[], T]) -> T | None:
        """What `read` finds at `source`; None of a hub that cannot be reached."""
        with _offline(not Path(source).exists() and not self._hub_answers):
            try:
                return read()
            except UnreachableError:
                return None

    @cached_property
    def _hub_answers(self) -> bool:
        """Asked once, because its library would ask for half a minute, several times."""
        if constants.HF_HUB_OFFLINE:
            return False
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
        except Exception:  # of several libraries
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
        """What is planned with: what the source says, else what the recipe states; alike if their sizes are."""
        if found is None:
            if not is_stated:
                raise InputError(
                    f"{source} cannot be reached, and the recipe does not state its sizes; set {keys} beside it"
                )
            self.remarks.append(f"{source} was not reached: its sizes are those that the recipe states ({keys})")
            return stated
        if is_stated and size_of(found) != size_of(stated):
            self.remarks.append(f"the recipe states another {keys} than {source} has: planned with what that has")
        return found


def _weights_of(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """While open, only what is on this machine is looked at, if so wanted."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
