"""How each stage of a recipe is made: what it reads, what it calls, and what it records."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, load_from_disk
from transformers import PreTrainedModel, set_seed

from cocomix import files, fingerprint, portable, processes
from cocomix.catalog.building import build_catalog
from cocomix.concepts.alignment import OtherTokens
from cocomix.concepts.attribution import ConceptExtractor
from cocomix.concepts.label_baselines import label_baselines
from cocomix.concepts.label_statistics import label_statistics
from cocomix.concepts.label_store import LabelsInfo, labels_fingerprint, labels_whole
from cocomix.concepts.labelling import LabelsConfig, Side, label_corpus
from cocomix.concepts.reading import SameTokens, TeacherReader
from cocomix.concepts.sae_loading import load_sae
from cocomix.concepts.sae_quality import sae_quality, write_quality
from cocomix.concepts.sae_training import train_sae
from cocomix.concepts.teacher import check_causal, teacher_fingerprint
from cocomix.data.corpus import is_token_folder, write_documents
from cocomix.data.documents import load_documents
from cocomix.data.packing import PackedCorpus, pack_documents, pack_token_documents, pack_token_files
from cocomix.data.tokenizer import load_tokenizer, train_tokenizer
from cocomix.distillation.predictions import PredictionsInfo, predict_corpus, predictions_whole
from cocomix.errors import InputError
from cocomix.evaluation.documents import document_losses, save_document_losses
from cocomix.evaluation.validation import evaluate_model
from cocomix.learning import (
    concept_extractor,
    labelling_flops,
    preparation,
    sae_training_flops,
    student_blocks,
    student_objective,
    teacher_flops,
    training_blocks,
)
from cocomix.methods import DistillationConfig
from cocomix.models.building import backbone_config, build_plain
from cocomix.models.configuration import CoCoMixConfig
from cocomix.objectives import NextToken, Objective
from cocomix.stages import Made
from cocomix.students import build_student, start_from, student_config
from cocomix.training.config import TrainingConfig
from cocomix.training.pretrain import TrainingResult, pretrain
from cocomix.training.run import Run, describe_run, save_run

if TYPE_CHECKING:
    from cocomix.pipeline import Pipeline


def make_corpus(pipeline: Pipeline) -> Made:
    """Documents, tokenizer, blocks."""
    recipe = pipeline.recipe
    folder = files.partial(pipeline.corpus_stage.folder)
    documents = None
    if not is_token_folder(recipe.corpus.source):
        documents = write_documents(recipe.corpus, folder / "documents")
    if recipe.tokenizer.source is not None:
        tokenizer = load_tokenizer(recipe.tokenizer.source)
    else:
        texts = load_from_disk(str(folder / "documents" / "train"))["text"]
        tokenizer = train_tokenizer(texts, recipe.tokenizer.vocab_size)
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    if documents is None and recipe.corpus.streaming is not None:
        info = pack_token_documents(recipe.corpus, tokenizer, recipe.block_size, folder)
    elif documents is None:
        info = pack_token_files(Path(recipe.corpus.source), tokenizer, recipe.block_size, folder)
    else:
        info = pack_documents(folder / "documents", tokenizer, recipe.block_size, folder)
    if recipe.corpus.streaming is None:
        _check_corpus_size(pipeline, info.train_blocks * info.block_size)
    streamed = "" if recipe.corpus.streaming is None else ", streamed; of it a sample"
    summary = {
        "source": portable.short(recipe.corpus.source) + streamed,
        "documents": documents and dataclasses.asdict(documents),
        "packed": dataclasses.asdict(info),
    }
    return Made(info.fingerprint, summary)


def _check_corpus_size(pipeline: Pipeline, tokens: int) -> None:
    """Raise InputError if a training's step is larger than the corpus."""
    trainings = {"training": pipeline.recipe.training}
    if pipeline.recipe.trains_teacher():
        trainings["teacher.training"] = pipeline.recipe.teacher.training
    for name, training in trainings.items():
        if training.tokens_per_step > tokens:
            raise InputError(
                f"the training corpus has {tokens} tokens in whole blocks, less than one step of {name}: "
                f"{training.tokens_per_step}; use more text or lower {name}.tokens_per_step"
            )


def make_teacher_corpus(pipeline: Pipeline) -> Made:
    """The same documents in the teacher's tokens."""
    source = pipeline.recipe.teacher.source
    assert source is not None
    tokenizer = load_tokenizer(source)
    documents = pipeline.corpus_stage.folder / "documents"
    folder = files.partial(pipeline.teacher_corpus_stage.folder)
    info = pack_documents(documents, tokenizer, pipeline.recipe.block_size, folder)
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    return Made(info.fingerprint, {"packed": dataclasses.asdict(info)})


def make_teacher(pipeline: Pipeline) -> Made:
    """Train the teacher, or look at the one that is given."""
    config, folder = pipeline.recipe.teacher, pipeline.teacher_stage.folder
    corpus = pipeline.teacher_corpus()
    if config.source is not None:
        teacher = pipeline.teacher()
        check_causal(teacher, "teacher", config.source)
        loss = evaluate_model(teacher, corpus.validation, config.training.blocks_per_batch)
        summary = {"source": portable.short(config.source), "dtype": str(teacher.dtype), "metrics": loss}
        return Made(teacher_fingerprint(teacher), summary)
    tokenizer = pipeline.tokenizer()
    set_seed(pipeline.recipe.seed)
    model = build_plain(
        backbone_config(
            config.backbone,
            vocab_size=corpus.info.vocab_size,
            block_size=pipeline.recipe.block_size,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    seed = pipeline.recipe.seed
    result = _pretrain(pipeline, model, NextToken(), corpus, config.training, folder, "teacher", seed)
    run = describe_run(
        model, result, name="teacher", method="ntp", seed=seed, corpus=corpus.info, recipe=pipeline.recipe.to_dict()
    )
    if processes.is_first():
        save_run(run, files.partial(folder))
    # From its file, which is whole however the training was shared out.
    return Made(teacher_fingerprint(pipeline.teacher()), _figures(run))


def make_backbone(pipeline: Pipeline, source: str) -> Made:
    """Look at the pretrained model from which students start."""
    model = pipeline.backbone(source)
    check_causal(model, "backbone", source)
    corpus, training = pipeline.corpus(), pipeline.recipe.training
    loss = evaluate_model(model.eval().to(pipeline.device), corpus.validation, training.blocks_per_batch)
    summary = {"source": portable.short(source), "stored_parameters": model.num_parameters(), "metrics": loss}
    return Made(fingerprint.of_tensors(model.state_dict().items()), summary)


def make_sae(pipeline: Pipeline) -> Made:
    """Train the SAE, or load the one that is given, and measure it."""
    config, folder = pipeline.recipe.sae, files.partial(pipeline.sae_stage.folder)
    teacher, corpus = pipeline.teacher(), pipeline.teacher_corpus()
    if config.source is None:
        train_sae(teacher, corpus.train, config, folder, pipeline.recipe.seed)
    sae = load_sae(config.source or folder, config.max_active).to(pipeline.device)
    measured = sae_quality(
        teacher, sae, corpus.validation, config.teacher_layer, pipeline.recipe.labels.blocks_per_batch
    )
    write_quality(measured, folder)
    quality = dataclasses.asdict(measured.quality)
    return Made(
        sae.fingerprint(),
        {
            "source": config.source and portable.short(config.source),
            "d_sae": sae.d_sae,
            "k": sae.max_active,
            "quality": quality,
            "training_flops": None if config.source else sae_training_flops(pipeline, teacher, sae.d_sae).total,
        },
    )


def make_labels(pipeline: Pipeline, config: LabelsConfig) -> Made:
    """Label the corpus, this process its share of it."""
    if config.source is not None:
        labelled = pipeline.labels(config)
        return Made(labels_fingerprint(labelled.info), dataclasses.asdict(labelled.info))
    extractor = concept_extractor(pipeline, config, pipeline.teacher())
    info = _label_into(pipeline, config, files.partial(pipeline.labels_stage_of(config).folder), extractor)
    flops = labelling_flops(pipeline, extractor.teacher, extractor.sae, config).total
    summary = {**dataclasses.asdict(info), "flops_per_token": flops}
    return Made(labels_fingerprint(info), summary)


def repair_labels(pipeline: Pipeline, config: LabelsConfig) -> bool:
    """Make anew what is damaged of the finished labels, in place; whether anything was."""
    folder = pipeline.labels_stage_of(config).folder
    if labels_whole(folder):
        return False
    _label_into(pipeline, config, folder, concept_extractor(pipeline, config, pipeline.teacher()))
    return True


def _label_into(pipeline: Pipeline, config: LabelsConfig, folder: Path, extractor: ConceptExtractor) -> LabelsInfo:
    corpus = pipeline.corpus()
    plan = LabelsInfo(
        corpus=corpus.info.fingerprint,
        teacher=pipeline.teacher_stage.record().fingerprint,
        sae=pipeline.sae_stage.record().fingerprint,
        teacher_layer=extractor.teacher_layer,
        num_concepts=extractor.sae.d_sae,
        labels_per_token=config.labels_per_token,
        selection=config.selection,
        alignment=config.alignment,
        online=config.online,
    )
    sides = {"validation": corpus.validation}
    if not config.online:
        sides = {"train": corpus.train, **sides}
    return label_corpus(
        extractor,
        {name: Side(blocks, _reader(pipeline, name, blocks, extractor.teacher)) for name, blocks in sides.items()},
        folder,
        config,
        plan,
    )


def make_predictions(pipeline: Pipeline, config: DistillationConfig) -> Made:
    """Store what the teacher predicts, this process its share of it."""
    info = _predict_into(pipeline, config, files.partial(pipeline.predictions_stage_of(config).folder))
    return Made(fingerprint.of_json(dataclasses.asdict(info)), dataclasses.asdict(info))


def repair_predictions(pipeline: Pipeline, config: DistillationConfig) -> bool:
    """Make anew what is damaged of the finished predictions, in place; whether anything was."""
    folder = pipeline.predictions_stage_of(config).folder
    if predictions_whole(folder):
        return False
    _predict_into(pipeline, config, folder)
    return True


def _predict_into(pipeline: Pipeline, config: DistillationConfig, folder: Path) -> PredictionsInfo:
    assert config.top_k is not None
    corpus, labels = pipeline.corpus(), pipeline.recipe.labels
    plan = PredictionsInfo(
        corpus=corpus.info.fingerprint,
        teacher=pipeline.teacher_stage.record().fingerprint,
        top_k=config.top_k,
        temperature=config.temperature,
    )
    return predict_corpus(
        pipeline.teacher(),
        corpus.train,
        folder,
        plan,
        vocab_size=corpus.info.vocab_size,
        blocks_per_batch=labels.blocks_per_batch,
        blocks_per_shard=labels.blocks_per_shard,
    )


def _reader(pipeline: Pipeline, side: str, blocks: Dataset, teacher: PreTrainedModel) -> TeacherReader:
    documents = load_documents(pipeline.corpus_stage.folder, side)
    if pipeline.recipe.labels.alignment == "tokens":
        return SameTokens(blocks, pipeline.tokenizer(), documents)
    assert documents is not None, "token files were refused before"
    context = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    return OtherTokens(
        blocks, pipeline.recipe.block_size, documents, pipeline.tokenizer(), pipeline.teacher_tokenizer(), context
    )


def make_catalog(pipeline: Pipeline) -> Made:
    """What each concept stands for."""
    labelled = pipeline.labels()
    counted = labelled.train or labelled.validation  # of online labels there are none of training text
    statistics = label_statistics(counted, labelled.info.num_concepts)
    read = pipeline.teacher_corpus_stage.folder
    documents = load_documents(read, "train", texts=pipeline.corpus_stage.folder)
    info = build_catalog(
        pipeline.teacher(),
        pipeline.sae(),
        pipeline.recipe.sae.teacher_layer,
        SameTokens(pipeline.teacher_corpus().train, pipeline.teacher_tokenizer(), documents),
        statistics.concept_counts,
        statistics.tokens,
        pipeline.recipe.catalog,
        pipeline.recipe.labels.blocks_per_batch,
        files.partial(pipeline.catalog_stage.folder),
    )
    return Made(fingerprint.of_json(dataclasses.asdict(info)), dataclasses.asdict(info))


def make_student(pipeline: Pipeline, name: str, seed: int) -> Made:
    """Train one student."""
    recipe, student = pipeline.recipe, pipeline.recipe.students[name]
    corpus, tokenizer = pipeline.corpus(), pipeline.tokenizer()
    config = student_config(recipe, name, pipeline.student_context(corpus.info.vocab_size, tokenizer.eos_token_id))
    blocks = student_blocks(pipeline, student, corpus)
    objective = student_objective(pipeline, student, corpus.info.vocab_size)
    source = recipe.backbone_of(student).source
    pretrained = None if source is None else pipeline.backbone(source)
    set_seed(seed)
    model = build_student(config) if pretrained is None else start_from(config, pretrained, name)
    folder = pipeline.student_stages[name, seed].folder
    result = _pretrain(pipeline, model, objective, blocks, recipe.training_of(student), folder, folder.name, seed)
    _save_document_losses(pipeline, model, corpus, files.partial(folder))
    run = describe_run(
        model,
        result,
        name=name,
        method=student.method,
        seed=seed,
        corpus=corpus.info,
        recipe=recipe.to_dict(),
        teacher_flops_per_token=teacher_flops(pipeline, student).total,
        preparation=preparation(pipeline, student),
    )
    if student.learns_concepts():
        assert isinstance(config, CoCoMixConfig)
        # Online, no labels of training text are kept; counts of the validation labels themselves are harder to beat.
        known = blocks.train if "concept_ids" in blocks.train.column_names else blocks.validation
        run.metrics.update(
            label_baselines(
                known, blocks.validation, config.vocab_size, config.num_concepts, config.num_active_concepts
            )
        )
    if processes.is_first():
        save_run(run, files.partial(folder))
    return Made(fingerprint.of_json(run.curve), _figures(run))


def _pretrain(
    pipeline: Pipeline,
    model: PreTrainedModel,
    objective: Objective,
    blocks: PackedCorpus,
    training: TrainingConfig,
    folder: Path,
    description: str,
    seed: int,
) -> TrainingResult:
    """Train into the unfinished folder."""
    return pretrain(
        model,
        objective,
        training_blocks(pipeline, blocks, seed),
        blocks.validation,
        training,
        folder,
        description=description,
        seed=seed,
        tokenizer=pipeline.tokenizer(),
        parallel=pipeline.recipe.parallel,
    )


def _save_document_losses(pipeline: Pipeline, model: PreTrainedModel, corpus: PackedCorpus, folder: Path) -> None:
    """What the trained model says of each validation document, for paired comparisons."""
    training = pipeline.recipe.training
    documents = load_documents(pipeline.corpus_stage.folder, "validation")
    found = document_losses(model.eval(), corpus.validation, documents, training.blocks_per_batch, training.precision)
    if processes.is_first():
        save_document_losses(found, folder)


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
