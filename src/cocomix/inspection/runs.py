"""Open a saved model with what belongs to it: tokenizer, training record, corpus and concept catalog."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cocomix.catalog.rows import INFO_FILE as CATALOG_FILE
from cocomix.catalog.search import Catalog, open_catalog
from cocomix.common import distributed, integrity
from cocomix.common.console import status
from cocomix.common.errors import InputError
from cocomix.data.corpus import PACKED_FILE
from cocomix.data.packing import load_packed
from cocomix.data.tokenizer import load_tokenizer, vocabulary_size
from cocomix.models.loading import check_vocabulary, load_causal_lm, load_config
from cocomix.training.run import RUN_FILE, Run, load_run, output_folder, run_folders

METHOD = "cocomix"
CHANGED = f"restore it, or delete {integrity.SUMS_FILE} if you changed it on purpose"


@dataclass(frozen=True)
class OpenRun:
    """A saved model and what belongs to it. The weights load when `model` is first read.

    Attributes:
        folder: folder of the model.
        config: its configuration.
        tokenizer: its tokenizer.
        record: contents of its `run.json`; None for a model trained elsewhere.
        catalog: catalog of its concepts, or None.
    """

    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    record: Run | None = None
    catalog: Catalog | None = None

    @property
    def name(self) -> str:
        """Name of the model's folder."""
        return self.folder.resolve().name

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model in float32 and evaluation mode, on the GPU if there is one."""
        return load_causal_lm(self.folder, dtype=torch.float32).eval().to(distributed.device())

    @cached_property
    def corpus(self) -> Path | None:
        """Folder of the packed corpus that the model was trained on; None if it is gone or has changed.

        The corpus of OUTPUT/students/NAME and of OUTPUT/teacher is OUTPUT/corpus.
        """
        if self.record is None:
            return None
        for output in self.folder.resolve().parents[:2]:
            corpus = output / "corpus"
            if (corpus / PACKED_FILE).is_file() and load_packed(corpus).info.fingerprint == self.record.corpus:
                return corpus
        return None

    @property
    def context_length(self) -> int | None:
        """Context length in tokens; None if the configuration does not state it."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def catalog_command(self) -> str:
        """The command that builds the catalog of the run's concepts."""
        return f"cocomix concepts {'RECIPE' if self.record is None else shlex.quote(str(self.folder))}"

    @property
    def no_catalog(self) -> str:
        """A sentence for a run without a catalog."""
        return f"This run has no concept catalog, so concepts have only numbers; `{self.catalog_command}` builds one."

    @property
    def names(self) -> dict[int, str]:
        """Names of the concepts by id; empty without a catalog."""
        return {} if self.catalog is None else self.catalog.names


def model_folder(path: Path) -> Path:
    """Return the folder of a model: `path` itself, or of an output folder the first student of method `cocomix`.

    An output folder without such a student stands for its first one. The choice is printed.
    """
    if (path / "config.json").is_file():
        return path
    runs = run_folders(path)
    if runs == [path]:
        return path
    chosen = next((run for run in runs if load_run(run).method == METHOD), runs[0])
    status(f"Model: {chosen}")
    return chosen


def open_model(folder: Path) -> OpenRun:
    """Open any saved causal language model without loading its weights or looking for a catalog.

    Raises:
        InputError: `folder` holds no model, the model needs custom code, or its tokenizer does not fit.
    """
    if not (folder / "config.json").is_file():
        raise InputError(
            f"no model in {folder}: it has no config.json; give the output folder of a recipe, one of its "
            "students (OUTPUT/students/NAME), or any folder that save_pretrained wrote"
        )
    integrity.verify(folder, CHANGED, names={path.name for path in folder.iterdir()})
    record = load_run(folder) if (folder / RUN_FILE).is_file() else None
    config, tokenizer = load_config(folder), load_tokenizer(str(folder))
    check_vocabulary(config, vocabulary_size(tokenizer), folder)
    return OpenRun(folder, config, tokenizer, record)


def open_run(folder: Path, catalog: Path | None = None) -> OpenRun:
    """Open a model that mixes concepts, with its catalog, without loading its weights.

    Args:
        folder: folder of the model.
        catalog: folder of its catalog; by default the folder `catalog` of the run's output, if it exists.

    Raises:
        InputError: there is no such model, it mixes no concepts, or the catalog describes other concepts.
    """
    run = open_model(folder)
    if not getattr(run.config, "mixes_concepts", False):
        raise InputError(
            f"the model in {run.folder} mixes no concepts in; give a run of method cocomix whose mixing is add or "
            "interleave"
        )
    found = _catalog(run.folder, catalog)
    if found is not None:
        _check_catalog(found, run)
    return dataclasses.replace(run, catalog=found)


def _catalog(run: Path, given: Path | None) -> Catalog | None:
    if given is not None:
        return open_catalog(given)
    default = output_folder(run) / "catalog"
    return open_catalog(default) if (default / CATALOG_FILE).is_file() else None


def _check_catalog(catalog: Catalog, run: OpenRun) -> None:
    """Raise InputError if the catalog describes other concepts than those of the run."""
    if catalog.info.num_concepts != run.config.num_concepts:
        raise InputError(
            f"the catalog {catalog.folder} has {catalog.info.num_concepts} concepts and the model in {run.folder} "
            f"{run.config.num_concepts}; give --catalog FOLDER of the concepts that it was trained with"
        )
    preparation = {} if run.record is None else run.record.preparation
    if preparation.get("sae", {}).get("fingerprint") not in (None, catalog.info.sae):
        raise InputError(
            f"the catalog {catalog.folder} is of another SAE than the one that {run.folder} learned concepts from; "
            "give --catalog FOLDER of the concepts that it was trained with"
        )
