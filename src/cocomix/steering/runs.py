"""A trained model with what is needed to look into it: tokenizer, catalogue, device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cocomix import processes
from cocomix.catalog.rows import INFO_FILE
from cocomix.catalog.search import Catalog, open_catalog
from cocomix.data.tokenizer import load_tokenizer, vocabulary_size
from cocomix.errors import InputError
from cocomix.models.causal_lm import CoCoMixForCausalLM
from cocomix.models.loading import check_vocabulary, load_causal_lm
from cocomix.training.run import RUN_FILE, load_run

QUICKSTART = Path("runs") / "quickstart"


@dataclass(frozen=True)
class OpenRun:
    """A run, opened.

    Attributes:
        folder: where it lies.
        model: on a GPU if there is one, in evaluation mode.
        tokenizer: its own.
        catalog: of its concepts; None if none was made.
    """

    folder: Path
    model: CoCoMixForCausalLM
    tokenizer: PreTrainedTokenizerBase
    catalog: Catalog | None

    @property
    def names(self) -> dict[int, str]:
        """Of the concepts, as far as there is a catalogue."""
        return {} if self.catalog is None else self.catalog.names


def open_run(folder: Path | None, catalog: Path | None = None) -> OpenRun:
    """Open the run in `folder`, by default the newest of the quickstart that mixes concepts.

    Args:
        folder: of a trained model.
        catalog: folder of its catalogue; by default `catalog` of the recipe's output, if there is one.

    Raises:
        InputError: no such run, a model without concepts, a catalogue of other concepts.
    """
    folder = _quickstart_run() if folder is None else folder
    if not (folder / "config.json").is_file():
        raise InputError(f"no trained model in {folder}: it has no config.json; give a folder OUTPUT/students/NAME")
    model, tokenizer = load_causal_lm(folder), load_tokenizer(str(folder))
    check_vocabulary(model.config, vocabulary_size(tokenizer), folder)
    if not (isinstance(model, CoCoMixForCausalLM) and model.mixes_concepts):
        raise InputError(f"the model in {folder} mixes no concepts in; give a run of method cocomix")
    found = _catalog(folder, catalog)
    if found is not None and found.info.num_concepts != model.config.num_concepts:
        raise InputError(
            f"the catalogue {found.folder} has {found.info.num_concepts} concepts and the model in {folder} "
            f"{model.config.num_concepts}; give --catalog FOLDER of the concepts that it was trained with"
        )
    if found is not None and _sae_of(folder) not in (None, found.info.sae):
        raise InputError(
            f"the catalogue {found.folder} is of another SAE than the one that {folder} learnt concepts of; give "
            "--catalog FOLDER of the concepts that it was trained with"
        )
    return OpenRun(folder, model.to(processes.device()).eval(), tokenizer, found)


def _sae_of(run: Path) -> str | None:
    """Fingerprint of the SAE that a run learnt concepts of, if that is on record."""
    if not (run / RUN_FILE).is_file():
        return None
    return load_run(run).preparation.get("sae", {}).get("fingerprint")


def _catalog(run: Path, given: Path | None) -> Catalog | None:
    if given is not None:
        return open_catalog(given)
    beside = run.absolute().parent.parent / "catalog"  # OUTPUT/students/NAME, OUTPUT/catalog
    return open_catalog(beside) if (beside / INFO_FILE).is_file() else None


def _quickstart_run() -> Path:
    """The newest run of the quickstart that was trained with cocomix."""
    runs = sorted(QUICKSTART.glob(f"students/*/{RUN_FILE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in runs:
        if load_run(path.parent).method == "cocomix":
            return path.parent
    raise InputError(f"which model? there is no cocomix student in {QUICKSTART}; give a folder OUTPUT/students/NAME")
