"""Compute the artifacts that students learn from: corpus, SAE, labels, predictions, catalog.

Each function writes into the folder that it is given and returns what the stage records.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from transformers import PreTrainedModel

from cocomix.catalog.building import CatalogConfig, build_catalog
from cocomix.common import distributed, files, fingerprint, integrity, portable
from cocomix.common.console import status, warn
from cocomix.common.errors import InputError
from cocomix.concepts.attribution import ConceptExtractor
from cocomix.concepts.label_statistics import label_statistics
from cocomix.concepts.label_store import LabeledCorpus, LabelsInfo, labels_fingerprint, precision_remark
from cocomix.concepts.labeling import LabelsConfig, Side, differing_share, label_corpus
from cocomix.concepts.predictions import Predictions, PredictionsInfo
from cocomix.concepts.reading import TeacherReader
from cocomix.concepts.sae_loading import load_sae
from cocomix.concepts.sae_quality import quality_warnings, sae_quality, write_quality
from cocomix.concepts.sae_training import SAEConfig, train_sae
from cocomix.concepts.teacher_losses import LossesInfo, TeacherLosses
from cocomix.concepts.teacher_outputs import TeacherOutputs
from cocomix.data.corpus import CorpusConfig, is_packed_folder, is_token_folder, write_documents
from cocomix.data.packing import (
    PackedCorpus,
    PackedInfo,
    load_packed,
    pack_documents,
    pack_token_documents,
    pack_token_files,
)
from cocomix.data.source_state import STATE_FILE, record_sources
from cocomix.data.tokenizer import TokenizerConfig, load_tokenizer, tokenizer_fingerprint, train_tokenizer
from cocomix.models.flops import labeling_flops_per_token
from cocomix.pipeline.costs import sae_training_flops
from cocomix.pipeline.methods import DistillationConfig
from cocomix.pipeline.stage import RECORD_FILE, STAGE_FILES, Stage, StageResult
from cocomix.training.config import TrainingConfig


def make_corpus(
    corpus: CorpusConfig,
    tokenizer_config: TokenizerConfig,
    block_size: int,
    trainings: Mapping[str, TrainingConfig],
    folder: Path,
) -> StageResult:
    """Read the documents, train or load the tokenizer, and pack the tokens into blocks.

    Args:
        corpus: where the text comes from.
        tokenizer_config: how its tokenizer is obtained.
        block_size: T, tokens of a block.
        trainings: that read the corpus, by their recipe keys; each needs the tokens of one step.
        folder: where to write.

    Raises:
        InputError: the text cannot be read, or is less than one step of a training.
    """
    if is_packed_folder(corpus.source):
        assert tokenizer_config.source is not None, "preflight refuses it"
        return _link_corpus(Path(corpus.source), tokenizer_config.source, block_size, trainings, folder)
    record_sources(corpus, folder)
    documents = None
    if not is_token_folder(corpus.source):
        documents = write_documents(corpus, folder / "documents")
    if tokenizer_config.source is not None:
        tokenizer = load_tokenizer(tokenizer_config.source)
    else:
        texts = load_from_disk(str(folder / "documents" / "train"))["text"]
        tokenizer = train_tokenizer(texts, tokenizer_config.vocab_size)
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    if documents is None and corpus.streaming is not None:
        info = pack_token_documents(corpus, tokenizer, block_size, folder)
    elif documents is None:
        info = pack_token_files(Path(corpus.source), tokenizer, block_size, folder)
    else:
        info = pack_documents(folder / "documents", tokenizer, block_size, folder)
    if corpus.streaming is None:
        _check_corpus_size(trainings, info.train_blocks * info.block_size)
    streamed = "" if corpus.streaming is None else ", streamed; of it a sample"
    summary = {
        "source": corpus.named() + streamed,
        "documents": documents and dataclasses.asdict(documents),
        "packed": dataclasses.asdict(info),
    }
    return StageResult(info.fingerprint, summary)


def check_packed(source: Path, tokenizer: str, block_size: int) -> PackedInfo:
    """Return the description of another run's packed corpus.

    Raises:
        InputError: it is damaged, or has another block size or tokenizer than the recipe.
    """
    info = load_packed(source).info
    if info.block_size != block_size:
        raise InputError(
            f"block_size is {block_size}, but the corpus {source} has blocks of {info.block_size} tokens; set "
            f"block_size to {info.block_size}"
        )
    if tokenizer_fingerprint(load_tokenizer(tokenizer)) != info.tokenizer_fingerprint:
        raise InputError(
            f"tokenizer.source is {tokenizer}, but the corpus {source} was packed with another tokenizer; leave "
            "tokenizer.source out"
        )
    return info


def _link_corpus(
    source: Path, tokenizer: str, block_size: int, trainings: Mapping[str, TrainingConfig], folder: Path
) -> StageResult:
    """Fill `folder` with links to the files of another run's packed corpus."""
    info = check_packed(source, tokenizer, block_size)
    integrity.verify(source, "restore it, or pack the text again")
    _check_corpus_size(trainings, info.train_blocks * info.block_size)
    for path in sorted(source.resolve().iterdir()):
        if path.name not in (*STAGE_FILES, STATE_FILE):
            (folder / path.name).symlink_to(path.resolve())
    record = source / RECORD_FILE
    documents = files.read_json(record)["summary"].get("documents") if record.is_file() else None
    summary = {"source": portable.short(source), "documents": documents, "packed": dataclasses.asdict(info)}
    return StageResult(info.fingerprint, summary)


def share_corpus(stage: Stage, folder: Path) -> StageResult:
    """Fill `folder` with links to the finished corpus of another replicate, relative, so that both can be moved."""
    stage.verify(f"delete {stage.folder} to compute it again")
    for path in sorted(stage.folder.iterdir()):
        if path.name not in STAGE_FILES:
            (folder / path.name).symlink_to(os.path.relpath(path, folder))
    record = stage.record()
    return StageResult(record.fingerprint, record.summary)


def _check_corpus_size(trainings: Mapping[str, TrainingConfig], tokens: int) -> None:
    for name, training in trainings.items():
        if training.tokens_per_step > tokens:
            raise InputError(
                f"the training corpus has {tokens} tokens in complete blocks, less than one step of {name}: "
                f"{training.tokens_per_step}; use more text or lower {name}.tokens_per_step"
            )


def make_teacher_corpus(teacher_source: str, documents: Path, block_size: int, folder: Path) -> StageResult:
    """Pack the documents of the corpus again, in the tokens of a teacher with another tokenizer."""
    tokenizer = load_tokenizer(teacher_source)
    info = pack_documents(documents, tokenizer, block_size, folder)
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    return StageResult(info.fingerprint, {"packed": dataclasses.asdict(info)})


def make_sae(
    teacher: PreTrainedModel, corpus: PackedCorpus, config: SAEConfig, *, seed: int, blocks_per_batch: int, folder: Path
) -> StageResult:
    """Train the SAE, or load the given one, and measure its quality on the validation blocks. Every rank calls this.

    Args:
        teacher: frozen.
        corpus: in the teacher's tokens.
        config: how the SAE is trained, or where it is.
        seed: of its initialization and of the order of the activations.
        blocks_per_batch: blocks that the teacher reads at once.
        folder: where to write.
    """
    if config.source is None:
        train_sae(teacher, corpus.train, config, folder, seed)
    sae = load_sae(config.source or folder, config.max_active).to(teacher.device)
    measured = sae_quality(teacher, sae, corpus.validation, config.teacher_layer, blocks_per_batch)
    quality = dataclasses.asdict(measured.quality)
    if distributed.is_main_process():
        write_quality(measured, folder)
        for line in quality_warnings(quality):
            warn(f"Warning: {line}")
    flops = None if config.source else sae_training_flops(config, teacher, sae.d_sae, corpus.info.block_size).total
    summary = {
        "source": config.source and portable.short(config.source),
        "d_sae": sae.d_sae,
        "k": sae.max_active,
        "quality": quality,
        "training_flops": flops,
    }
    return StageResult(sae.fingerprint(), summary)


def make_labels(
    corpus: PackedCorpus,
    extractor: ConceptExtractor,
    readers: Mapping[str, TeacherReader],
    config: LabelsConfig,
    inputs: Mapping[str, str],
    folder: Path,
    reference: Callable[[], ConceptExtractor] | None = None,
) -> StageResult:
    """Label the corpus. Every rank calls this and labels its share; complete shards in `folder` are kept.

    Args:
        corpus: in the students' tokens.
        extractor: teacher, SAE and selection.
        readers: how the teacher reads each side of the corpus.
        config: settings; with `online`, only the validation side is labeled.
        inputs: fingerprints of teacher and SAE.
        folder: where to write.
        reference: if the extractor runs in another precision, the same in float32; its labels are compared on a sample.
    """
    sides = {"train": corpus.train, "validation": corpus.validation}
    if config.online:
        del sides["train"]
    plan = LabelsInfo(
        corpus=corpus.info.fingerprint,
        teacher=inputs["teacher"],
        sae=inputs["sae"],
        teacher_layer=extractor.teacher_layer,
        num_concepts=extractor.sae.d_sae,
        labels_per_token=config.labels_per_token,
        selection=config.selection,
        alignment=config.alignment,
        online=config.online,
        window=config.window,
        targets=config.targets,
    )
    if reference is not None:
        plan = dataclasses.replace(plan, precision=str(extractor.teacher.dtype).removeprefix("torch."))
        if distributed.is_main_process():
            share = differing_share(extractor, reference(), readers["validation"], config.batch())
            plan = dataclasses.replace(plan, differing_share=share)
            status(str(precision_remark(plan)))
    to_label = {name: Side(blocks, readers[name]) for name, blocks in sides.items()}
    info = label_corpus(extractor, to_label, folder, config, plan)
    flops = labeling_flops_per_token(
        extractor.teacher,
        extractor.teacher_layer,
        extractor.sae.d_sae,
        extractor.sae.max_active,
        corpus.info.block_size,
        config.selection,
    )
    return StageResult(labels_fingerprint(info), {**dataclasses.asdict(info), "flops_per_token": flops.total})


def make_predictions(
    teacher: PreTrainedModel,
    corpus: PackedCorpus,
    config: DistillationConfig,
    batching: LabelsConfig,
    inputs: Mapping[str, str],
    folder: Path,
) -> StageResult:
    """Store the teacher's most probable tokens. Every rank calls this and computes its share.

    Args:
        teacher: frozen.
        corpus: whose training blocks it reads.
        config: number of tokens and temperature.
        batching: blocks per batch and per shard, as for labels.
        inputs: fingerprint of the teacher.
        folder: where to write; complete shards in it are kept.
    """
    assert config.top_k is not None
    plan = PredictionsInfo(corpus.info.fingerprint, inputs["teacher"], config.top_k, config.temperature)
    return _stored(Predictions(teacher, plan, corpus.info.vocab_size), corpus, batching, folder)


def make_losses(
    teacher: PreTrainedModel, corpus: PackedCorpus, batching: LabelsConfig, inputs: Mapping[str, str], folder: Path
) -> StageResult:
    """Store the teacher's losses, with the arguments of `make_predictions`. Every rank calls this."""
    plan = LossesInfo(corpus.info.fingerprint, inputs["teacher"])
    return _stored(TeacherLosses(teacher, plan, corpus.info.vocab_size), corpus, batching, folder)


def _stored(outputs: TeacherOutputs[Any], corpus: PackedCorpus, batching: LabelsConfig, folder: Path) -> StageResult:
    found = outputs.write(
        corpus.train, folder, blocks_per_batch=batching.batch(), blocks_per_shard=batching.blocks_per_shard
    )
    info = dataclasses.asdict(found)
    return StageResult(fingerprint.hash_json(info), info)


def make_catalog(
    extractor: ConceptExtractor,
    reader: TeacherReader,
    labeled: LabeledCorpus,
    config: CatalogConfig,
    blocks_per_batch: int,
    folder: Path,
) -> StageResult:
    """Describe every concept by the contexts in which it is most active.

    Args:
        extractor: teacher and SAE.
        reader: the training text as the teacher reads it.
        labeled: the labeled corpus, whose labels are counted; online labels exist for validation only.
        config: what is kept of each concept.
        blocks_per_batch: blocks that the teacher reads at once.
        folder: where to write.
    """
    statistics = label_statistics(labeled.train or labeled.validation, labeled.info.num_concepts)
    info = build_catalog(
        extractor.teacher,
        extractor.sae,
        extractor.teacher_layer,
        reader,
        statistics.concept_counts,
        statistics.tokens,
        config,
        blocks_per_batch,
        folder,
    )
    return StageResult(fingerprint.hash_json(dataclasses.asdict(info)), dataclasses.asdict(info))
