"""Open what the stages of a recipe have computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cocomix.common import distributed, files, fingerprint
from cocomix.common.errors import InputError
from cocomix.concepts.label_store import LabeledCorpus, check_labels, labels_fingerprint, load_labels, read_labels_info
from cocomix.concepts.labeling import EXTERNAL, LabelsConfig, fitting_blocks
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.sae_loading import load_sae
from cocomix.concepts.teacher import compile_blocks, freeze, teacher_fingerprint
from cocomix.data.packing import PackedCorpus, load_packed
from cocomix.data.tokenizer import load_tokenizer
from cocomix.models.building import load_pretrained, pretrained_config
from cocomix.models.loading import load_causal_lm, load_config
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.recipe_stages import Stages
from cocomix.pipeline.stage import require_unchanged
from cocomix.pipeline.students import StudentContext


class Pipeline(Stages):
    """The stages of one recipe, and their results; arguments as those of `Stages`."""

    def __init__(self, recipe: Recipe, replicate: Pipeline | None = None) -> None:
        super().__init__(recipe, replicate)
        self.device = torch.device(distributed.device())
        self._teacher: PreTrainedModel | None = None
        self._fingerprints: dict[str, str] = {}

    def corpus(self) -> PackedCorpus:
        """Open the packed corpus; InputError if it is linked to another run's, which has changed."""
        corpus = load_packed(self.corpus_stage.folder)
        require_unchanged(self.corpus_stage, corpus.info.fingerprint, f"the corpus {self.recipe.corpus.source}")
        return corpus

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the corpus."""
        return load_tokenizer(str(self.corpus_stage.folder / "tokenizer"))

    def teacher_corpus(self) -> PackedCorpus:
        """Open the packed corpus in the teacher's tokens."""
        return load_packed(self.teacher_corpus_stage.folder)

    def teacher_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the teacher's tokenizer."""
        return load_tokenizer(str(self.teacher_corpus_stage.folder / "tokenizer"))

    def teacher(self) -> PreTrainedModel:
        """Return the frozen teacher, loaded by the first call; InputError if it is not the one that was recorded.

        Its precision is `teacher.precision`; by default bfloat16 on a GPU, elsewhere that in which it was saved.
        """
        if self._teacher is None:
            teacher = freeze(load_causal_lm(self._teacher_source, self.recipe.teacher.dtype())).to(self.device)
            found = self._fingerprints["teacher"] = teacher_fingerprint(teacher)
            require_unchanged(self.teacher_stage, found, f"the teacher {self._teacher_source}")
            self._teacher = teacher.to(self._running_dtype() or teacher.dtype)
            if self.compiles_teacher:
                compile_blocks(self._teacher)
        return self._teacher

    @property
    def compiles_teacher(self) -> bool:
        """Whether teacher and SAE are compiled: on a GPU, in recipes that compile their students."""
        return self.device.type == "cuda" and self.recipe.training.compile

    def teacher_fingerprint(self) -> str:
        """Return the fingerprint of the teacher's weights as they were loaded, before a default precision."""
        self.teacher()
        return self._fingerprints["teacher"]

    def _running_dtype(self) -> torch.dtype | None:
        """Return the precision in which teacher and SAE run; None for that of their weights."""
        precise = self.recipe.teacher.dtype()
        if precise is None and self.device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.bfloat16
        return precise

    @contextmanager
    def teacher_products(self) -> Iterator[None]:
        """Use TF32 within the block if the recipe asks for a float32 teacher on a GPU.

        Students train in separate stages, outside of it, because their float32 stays float32.
        """
        before = torch.backends.cuda.matmul.fp32_precision
        if self.device.type == "cuda" and self.recipe.teacher.precision == "fp32":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    def float32_teacher(self) -> PreTrainedModel:
        """Load the teacher in float32, to compare what a lower precision computes."""
        return freeze(load_causal_lm(self._teacher_source, torch.float32)).to(self.device)

    def release_teacher(self) -> None:
        """Free the teacher's memory; the next call of `teacher` loads it again."""
        self._teacher = None

    @property
    def _teacher_source(self) -> str | Path:
        """The recipe's source, or the stage's folder, which is unfinished while the teacher is trained."""
        folder = self.teacher_stage.folder
        is_unfinished = not folder.exists() and files.partial(folder).exists()
        return self.recipe.teacher.source or (files.partial(folder) if is_unfinished else folder)

    @cached_property
    def teacher_model_config(self) -> PretrainedConfig:
        """The teacher's configuration."""
        return load_config(self._teacher_source).get_text_config()

    @cached_property
    def teacher_shapes(self) -> PreTrainedModel:
        """The teacher on the meta device, without weights: FLOPs are counted from its shapes."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.teacher_model_config)

    def sae(self) -> SparseAutoencoder:
        """Load the SAE, in the precision of the teacher; InputError if it is not the one that was recorded."""
        source = self.recipe.sae.source or str(self.sae_stage.folder)
        sae = load_sae(source, self.recipe.sae.max_active)
        found = self._fingerprints["sae"] = sae.fingerprint()
        require_unchanged(self.sae_stage, found, f"the SAE {source}")
        return sae.to(self.device, self._running_dtype() or sae.W_enc.dtype)

    def float32_sae(self) -> SparseAutoencoder:
        """Load the SAE in float32."""
        source = self.recipe.sae.source or str(self.sae_stage.folder)
        return load_sae(source, self.recipe.sae.max_active).to(self.device, torch.float32)

    def sae_fingerprint(self) -> str:
        """Return the fingerprint of the SAE's weights as they were loaded, before a default precision."""
        self.sae()
        return self._fingerprints["sae"]

    def with_batch(self, config: LabelsConfig) -> LabelsConfig:
        """Return the settings with `blocks_per_batch`, chosen from the free memory of a GPU unless it is given."""
        teacher, given = self.teacher(), config.blocks_per_batch
        chosen = given or fitting_blocks(teacher.device, teacher, self.recipe.block_size)
        return dataclasses.replace(config, blocks_per_batch=chosen)

    @cached_property
    def num_concepts(self) -> int:
        """C, number of concepts (latents of the SAE); 0 if no student learns concepts."""
        if not self.recipe.needs_labels():
            return 0
        if self.recipe.labels.source is not None:
            return read_labels_info(self.labels_folder()).num_concepts
        sae = self.recipe.sae
        return load_sae(sae.source).d_sae if sae.source else sae.d_sae

    def student_context(self, vocab_size: int, eos_token_id: int) -> StudentContext:
        """Return what the students' sizes depend on; 0 for sizes that no student needs."""
        width = self.teacher_hidden_size if self.recipe.mixes_hidden_states() else 0
        return StudentContext(vocab_size, eos_token_id, self.num_concepts, width)

    @property
    def teacher_hidden_size(self) -> int:
        """d, width of the teacher's residual stream."""
        teacher = self.recipe.teacher
        return self.teacher_model_config.hidden_size if teacher.source else teacher.backbone.hidden_size

    def labels_folder(self) -> Path:
        """Return the folder of the labeled corpus."""
        return Path(self.recipe.labels.source or self.labels_stage.folder)

    def labels(self, config: LabelsConfig | None = None) -> LabeledCorpus:
        """Open the labels of the recipe or of a student; InputError if their inputs or settings differ from it."""
        config = config or self.recipe.labels
        stage = self.labels_stage_of(config)
        folder = Path(config.source or stage.folder)
        labeled = load_labels(folder)
        if self.recipe.labels.source is not None and labeled.train is None:
            raise InputError(
                f"{folder} holds labels of validation text only (labels.online); label the training text too"
            )
        inputs: dict[str, Any] = {
            stage.name: stage.record().fingerprint
            for stage in (self.corpus_stage, self.teacher_stage, self.sae_stage)
            if stage.is_done()
        }
        if self.recipe.labels.source is not None and not stage.is_done():
            # With external labels, the stages of a given teacher and SAE do not run.
            if self.recipe.teacher.source is not None:
                inputs["teacher"] = self.teacher_fingerprint()
            if self.recipe.sae.source is not None:
                inputs["sae"] = self.sae_fingerprint()
        inputs["teacher_layer"] = self.recipe.sae.teacher_layer
        if labeled.info.selection == EXTERNAL:  # of no teacher and SAE
            inputs = {name: value for name, value in inputs.items() if name == "corpus"}
        check_labels(
            labeled.info,
            folder,
            **inputs,
            labels_per_token=config.labels_per_token,
            selection=config.selection,
            offset=config.offset,
            window=config.window,
            control=config.control,
            targets=config.targets,
        )
        require_unchanged(stage, labels_fingerprint(labeled.info), f"the labeled corpus {folder}")
        return labeled

    def backbone(self, source: str) -> PreTrainedModel:
        """Load a pretrained model that students start from; InputError if it is not the one that was recorded."""
        model = load_pretrained(source, pretrained_config(source, self.recipe.block_size))
        found = fingerprint.hash_tensors(model.state_dict().items())
        require_unchanged(self.backbone_stage_of(source), found, f"the backbone {source}")
        return model
