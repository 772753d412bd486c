"""Run a recipe's stages in order: skip what is done, go on with what was interrupted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from cocomix import files, fingerprint
from cocomix.concepts.attribution import ConceptExtractor
from cocomix.concepts.labelling import LabelledCorpus, check_labels, label_corpus, load_labels
from cocomix.concepts.sae import SparseAutoencoder, load_sae
from cocomix.concepts.sae_training import sae_quality, train_sae
from cocomix.concepts.teacher import freeze, teacher_fingerprint
from cocomix.console import say
from cocomix.data.corpus import is_token_folder, write_documents
from cocomix.data.packing import PackedCorpus, load_packed, pack_documents, pack_token_files
from cocomix.data.tokenizer import load_tokenizer, train_tokenizer
from cocomix.errors import InputError
from cocomix.evaluation.concepts import constant_recall
from cocomix.evaluation.flops import labelling_flops_per_token
from cocomix.evaluation.validation import evaluate_model
from cocomix.models.building import backbone_config, build_plain
from cocomix.models.configuration import CoCoMixConfig
from cocomix.objectives import NextToken, Objective
from cocomix.recipe import Recipe
from cocomix.stages import Made, Stage, require_unchanged
from cocomix.students import OBJECTIVES, build_student, num_concepts, student_config
from cocomix.training.pretrain import TrainingConfig, discard_checkpoints, pretrain
from cocomix.training.run import Run, describe_run, save_run

SAE_EVALUATION_BLOCKS = 128
"""Validation blocks on which an SAE's quality is measured."""


class Pipeline:
    """The stages of one recipe, in order: corpus, teacher, SAE, labels, students."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.output)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.corpus_stage = self._stage("corpus", ("corpus", "tokenizer", "block_size"), (), self._make_corpus)
        self.teacher_stage = self._stage("teacher", ("teacher", "seed"), (self.corpus_stage,), self._make_teacher)
        self.sae_stage = self._stage("sae", ("sae", "seed"), (self.corpus_stage, self.teacher_stage), self._make_sae)
        needed = (
            (self.corpus_stage, self.teacher_stage, self.sae_stage)
            if recipe.labels.source is None
            else (self.corpus_stage,)
        )
        self.labels_stage = self._stage("labels", ("labels",), needed, self._make_labels)
        self.student_stages = {name: self._student_stage(name) for name in recipe.students}

    def stages(self) -> list[Stage]:
        """What this recipe makes, in order; teacher, SAE and labels only if a student needs them."""
        concepts: list[Stage] = []
        if self.recipe.needs_labels():
            concepts = [self.labels_stage]
            if self.recipe.labels.source is None:
                concepts = [self.teacher_stage, self.sae_stage, self.labels_stage]
        return [self.corpus_stage, *concepts, *self.student_stages.values()]

    def run(self, stages: list[Stage]) -> None:
        """Make what is missing of `stages`."""
        for number, stage in enumerate(stages, 1):
            if stage.is_done():
                say(f"[{number}/{len(stages)}] {stage.name}: done before")
                continue
            say(f"[{number}/{len(stages)}] {stage.name}")
            stage.run()

    # What each stage leaves, opened again.

    def corpus(self) -> PackedCorpus:
        """The packed corpus."""
        return load_packed(self.corpus_stage.folder)

    def tokenizer(self) -> Any:
        """The tokenizer of the corpus."""
        return load_tokenizer(str(self.corpus_stage.folder / "tokenizer"))

    def teacher(self) -> PreTrainedModel:
        """The frozen teacher; InputError if it is not the one that the stage recorded."""
        source = self.recipe.teacher.source or str(self.teacher_stage.folder)
        teacher = freeze(AutoModelForCausalLM.from_pretrained(source)).to(self.device)
        require_unchanged(self.teacher_stage, teacher_fingerprint(teacher), f"the teacher {source}")
        return teacher

    def sae(self) -> SparseAutoencoder:
        """The SAE; InputError if it is not the one that the stage recorded."""
        source = self.recipe.sae.source or str(self.sae_stage.folder)
        sae = load_sae(source)
        require_unchanged(self.sae_stage, sae.fingerprint(), f"the SAE {source}")
        return sae.to(self.device)

    def labels(self) -> LabelledCorpus:
        """The labelled corpus; InputError if it was made from something else than the recipe's."""
        folder = Path(self.recipe.labels.source or self.labels_stage.folder)
        labelled = load_labels(folder)
        made_here = {
            stage.name: stage.record().fingerprint
            for stage in (self.corpus_stage, self.teacher_stage, self.sae_stage)
            if stage.is_done()
        }
        if self.recipe.labels.source is not None:  # then the stages of what the recipe names were not run
            if self.recipe.teacher.source is not None:
                made_here["teacher"] = teacher_fingerprint(self.teacher())
            if self.recipe.sae.source is not None:
                made_here["sae"] = self.sae().fingerprint()
        check_labels(
            labelled.info,
            folder,
            **made_here,
            teacher_layer=self.recipe.sae.teacher_layer,
            labels_per_token=self.recipe.labels.labels_per_token,
            selection=self.recipe.labels.selection,
        )
        return labelled

    # Making them.

    def _stage(self, name: str, keys: tuple[str, ...], needs: tuple[Stage, ...], make: Any) -> Stage:
        everything = self.recipe.to_dict()
        settings = {key: everything[key] for key in keys}
        return Stage(name, self.folder / name, settings, needs, make)

    def _student_stage(self, name: str) -> Stage:
        student = self.recipe.students[name]
        matched = self.recipe.students.get(student.match or "")
        settings = {
            "student": dataclasses.asdict(student),
            "match": matched and dataclasses.asdict(matched),
            "backbone": dataclasses.asdict(self.recipe.backbone),
            "training": dataclasses.asdict(self.recipe.training),
            "seed": self.recipe.seed,
        }
        needs = (self.corpus_stage, self.labels_stage) if student.method == "cocomix" else (self.corpus_stage,)
        folder = self.folder / "students" / name
        return Stage(f"student {name}", folder, settings, needs, lambda: self._make_student(name))

    def _make_corpus(self) -> Made:
        recipe = self.recipe
        with files.whole_folder(files.partial(self.corpus_stage.folder)) as folder:
            documents = None
            if not is_token_folder(recipe.corpus.source):
                documents = write_documents(recipe.corpus, folder / "documents")
            if recipe.tokenizer.source is not None:
                tokenizer = load_tokenizer(recipe.tokenizer.source)
            else:
                from datasets import load_from_disk

                texts = load_from_disk(str(folder / "documents" / "train"))["text"]
                tokenizer = train_tokenizer(texts, recipe.tokenizer.vocab_size)
            tokenizer.save_pretrained(str(folder / "tokenizer"))
            if documents is None:
                info = pack_token_files(Path(recipe.corpus.source), tokenizer, recipe.block_size, folder)
            else:
                info = pack_documents(folder / "documents", tokenizer, recipe.block_size, folder)
        self._check_corpus_size(info.train_blocks * info.block_size)
        summary = {
            "source": recipe.corpus.source,
            "documents": documents and dataclasses.asdict(documents),
            "packed": dataclasses.asdict(info),
        }
        return Made(info.fingerprint, summary)

    def _check_corpus_size(self, tokens: int) -> None:
        """Raise InputError if a training's step is larger than the corpus."""
        trainings = {"training": self.recipe.training}
        if self.recipe.trains_teacher():
            trainings["teacher.training"] = self.recipe.teacher.training
        for name, training in trainings.items():
            if training.tokens_per_step > tokens:
                raise InputError(
                    f"the training corpus has {tokens} tokens in whole blocks, less than one step of {name}: "
                    f"{training.tokens_per_step}; use more text or lower {name}.tokens_per_step"
                )

    def _make_teacher(self) -> Made:
        config, folder = self.recipe.teacher, self.teacher_stage.folder
        corpus = self.corpus()
        if config.source is not None:
            teacher = self.teacher()
            loss = evaluate_model(teacher, corpus.validation, config.training.blocks_per_batch)
            return Made(teacher_fingerprint(teacher), {"source": config.source, "metrics": loss})
        tokenizer = self.tokenizer()
        set_seed(self.recipe.seed)
        model = build_plain(
            backbone_config(
                config.backbone,
                vocab_size=corpus.info.vocab_size,
                block_size=self.recipe.block_size,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        run = self._pretrain(model, NextToken(), corpus, config.training, folder, "teacher", "ntp")
        save_run(run, files.partial(folder))
        discard_checkpoints(files.partial(folder))
        return Made(teacher_fingerprint(model), _figures(run))

    def _make_sae(self) -> Made:
        config, folder = self.recipe.sae, files.partial(self.sae_stage.folder)
        teacher, corpus = self.teacher(), self.corpus()
        sae = self.sae() if config.source else train_sae(teacher, corpus.train, config, folder, self.recipe.seed)
        sample = corpus.validation.select(range(min(SAE_EVALUATION_BLOCKS, len(corpus.validation))))
        quality = sae_quality(
            teacher, sae.to(self.device), sample, config.teacher_layer, self.recipe.labels.blocks_per_batch
        )
        return Made(
            sae.fingerprint(),
            {"source": config.source, "d_sae": sae.d_sae, "k": sae.k, "quality": dataclasses.asdict(quality)},
        )

    def _make_labels(self) -> Made:
        config = self.recipe.labels
        if config.source is not None:
            labelled = self.labels()
            return Made(fingerprint.of_json(dataclasses.asdict(labelled.info)), dataclasses.asdict(labelled.info))
        teacher, sae, corpus = self.teacher(), self.sae(), self.corpus()
        layer = self.recipe.sae.teacher_layer
        extractor = ConceptExtractor(teacher, sae, layer, config.labels_per_token, config.selection)
        info = label_corpus(
            extractor,
            corpus.train,
            corpus.validation,
            self.labels_stage.folder,
            config,
            corpus_fingerprint=corpus.info.fingerprint,
            teacher_fingerprint=self.teacher_stage.record().fingerprint,
        )
        cost = labelling_flops_per_token(teacher, layer, sae.d_sae, sae.k, self.recipe.block_size)
        summary = {**dataclasses.asdict(info), "flops_per_token": cost}
        return Made(fingerprint.of_json(dataclasses.asdict(info)), summary)

    def _make_student(self, name: str) -> Made:
        recipe, student = self.recipe, self.recipe.students[name]
        corpus, tokenizer = self.corpus(), self.tokenizer()
        config = student_config(
            recipe,
            name,
            vocab_size=corpus.info.vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            num_concepts=num_concepts(recipe),
        )
        objective = OBJECTIVES[student.method]
        blocks: PackedCorpus | LabelledCorpus = self.labels() if "concept_ids" in objective.columns else corpus
        set_seed(recipe.seed)
        run = self._pretrain(
            build_student(config),
            objective,
            corpus,
            recipe.training,
            self.student_stages[name].folder,
            name,
            student.method,
            blocks,
        )
        if isinstance(config, CoCoMixConfig):
            recall = constant_recall(blocks.train, blocks.validation, config.num_concepts, config.num_active_concepts)
            run.metrics["constant_recall"] = recall
        save_run(run, files.partial(self.student_stages[name].folder))
        discard_checkpoints(files.partial(self.student_stages[name].folder))
        return Made(fingerprint.of_json(run.curve), _figures(run))

    def _pretrain(
        self,
        model: PreTrainedModel,
        objective: Objective,
        corpus: PackedCorpus,
        training: TrainingConfig,
        folder: Path,
        name: str,
        method: str,
        blocks: PackedCorpus | LabelledCorpus | None = None,
    ) -> Run:
        """Train into the unfinished folder."""
        blocks = blocks or corpus
        result = pretrain(
            model,
            objective,
            blocks.train,
            blocks.validation,
            training,
            folder,
            description=name,
            seed=self.recipe.seed,
            tokenizer=self.tokenizer(),
        )
        return describe_run(
            model,
            result,
            name=name,
            method=method,
            seed=self.recipe.seed,
            corpus=corpus.info.fingerprint,
            block_size=self.recipe.block_size,
            bytes_per_token=corpus.info.bytes_per_token,
            recipe=self.recipe.to_dict(),
        )


def _figures(run: Run) -> dict[str, Any]:
    """What the report needs of a run that is not one of the compared ones."""
    keys = (
        "stored_parameters",
        "activated_parameters",
        "tokens",
        "training_flops_per_token",
        "metrics",
        "timing",
    )
    return {key: getattr(run, key) for key in keys}
