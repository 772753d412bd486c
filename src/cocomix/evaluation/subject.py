"""What is evaluated: a saved model, and the corpus that it was trained on if that lies beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cocomix import processes
from cocomix.data.packing import INFO_FILE, load_packed
from cocomix.data.tokenizer import load_tokenizer, vocabulary_size
from cocomix.errors import InputError
from cocomix.models.loading import check_vocabulary, load_causal_lm, load_config
from cocomix.training.run import RUN_FILE, Run, load_run


@dataclass(frozen=True)
class Subject:
    """A saved model.

    Attributes:
        folder: where it is.
        config: its configuration.
        tokenizer: its tokenizer.
        run: how it was trained; None of a model that was not trained here.
        corpus: folder of the packed corpus that it was trained on, if that is beside it.
    """

    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    run: Run | None
    corpus: Path | None

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can read at once; None if its configuration does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def model(self) -> PreTrainedModel:
        """The model in float32 and evaluation mode, whatever its weights were saved in."""
        return load_causal_lm(self.folder, dtype=torch.float32).eval().to(processes.device())


def open_subject(folder: Path) -> Subject:
    """The model saved in `folder`, not loaded yet.

    Raises:
        InputError: there is none, it needs code of its own, or its tokenizer does not fit.
    """
    if not (folder / "config.json").is_file():
        raise InputError(
            f"no model in {folder}: give the folder of a trained model, such as OUTPUT/students/NAME, or any that "
            "save_pretrained made"
        )
    run = load_run(folder) if (folder / RUN_FILE).is_file() else None
    corpus = None if run is None else _corpus_of(run, folder)
    config, tokenizer = load_config(folder), load_tokenizer(str(folder))
    check_vocabulary(config, vocabulary_size(tokenizer), folder)
    return Subject(folder, config, tokenizer, run, corpus)


def _corpus_of(run: Run, folder: Path) -> Path | None:
    """OUTPUT/corpus of OUTPUT/students/NAME or OUTPUT/teacher, if it is still the one that the run was trained on."""
    for output in folder.resolve().parents[:2]:
        corpus = output / "corpus"
        if (corpus / INFO_FILE).is_file() and load_packed(corpus).info.fingerprint == run.corpus:
            return corpus
    return None
