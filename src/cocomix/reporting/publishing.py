"""Upload a trained model to the Hugging Face Hub, with its card, SAE, concept catalog and labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from cocomix.catalog.rows import INFO_FILE as CATALOG_INFO
from cocomix.common import files
from cocomix.common.errors import InputError, error_message
from cocomix.common.version import __version__
from cocomix.concepts.label_store import LABELS_FILE
from cocomix.evaluation.record import EVALUATION_FILE
from cocomix.inspection.runs import open_model
from cocomix.pipeline.model_card import CARD_FILE, REPOSITORY, write_card
from cocomix.pipeline.recipe_file import recipe_of_run
from cocomix.pipeline.stage import RECORD_FILE, STAGE_FILES
from cocomix.training.run import RUN_FILE, Run, output_folder

MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    CARD_FILE,
    RUN_FILE,
    EVALUATION_FILE,
)
"""Files of a run's folder that are uploaded; the others concern this machine only."""


@dataclass(frozen=True)
class Upload:
    """A repository with what was uploaded.

    Attributes:
        url: address of the repository.
        files: number of files.
    """

    url: str
    files: int


def push_run(folder: Path, repo_id: str, labels: bool = False, private: bool | None = None) -> list[Upload]:
    """Upload a finished run in one commit: model, code, tokenizer, card and record; SAE and catalog, if it has them.

    Writes the model card first if the folder has none. The token is that of `hf auth login` or HF_TOKEN.

    Args:
        folder: folder of the trained model.
        repo_id: name of the repository, USER/NAME, which is created if it does not exist.
        labels: upload the labeled corpus too, as the dataset `REPO_ID-labels`.
        private: create private repositories; by default as the account has it.

    Raises:
        InputError: there is no finished run, there are no labels, or the Hub refuses something.
    """
    record = open_model(folder).record
    if record is None:
        raise InputError(f"no finished run in {folder}: it has no {RUN_FILE}; give a folder OUTPUT/students/NAME")
    output = output_folder(folder)
    labeled = output / "labels"
    if labels and not (_is_of(record, "labels", labeled) and _learned_as_stored(record, folder)):
        raise InputError(f"{labeled} holds no labels that {folder} learned from; leave out --labels")
    if not (folder / CARD_FILE).is_file():
        write_card(folder)
    model = [*_model_files(folder, repo_id), *_artifacts(record, output)]
    api = HfApi(library_name="cocomix", library_version=__version__)
    uploads = [_asked(lambda: _upload(api, repo_id, "model", model, private))]
    if labels:
        dataset = [*_files(labeled, "")]
        uploads.append(_asked(lambda: _upload(api, f"{repo_id}-labels", "dataset", dataset, private)))
    return uploads


def _model_files(folder: Path, repo_id: str) -> Iterator[CommitOperationAdd]:
    for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}):
        if path.name == CARD_FILE:
            card = path.read_text(encoding="utf-8").replace(REPOSITORY, repo_id)
            yield CommitOperationAdd(path.name, card.encode())
        else:
            yield CommitOperationAdd(path.name, path)


def _artifacts(run: Run, output: Path) -> Iterator[CommitOperationAdd]:
    """Yield the files of the SAE that the run learned concepts from and of their catalog, as far as they are there."""
    if not _is_of(run, "sae", output / "sae"):
        return
    yield from _files(output / "sae", "sae/")
    info = output / "catalog" / CATALOG_INFO
    if info.is_file() and files.read_json(info).get("sae") == run.preparation["sae"]["fingerprint"]:
        yield from _files(output / "catalog", "catalog/")


def _is_of(run: Run, kind: str, folder: Path) -> bool:
    """Return whether the run learned from the artifact in `folder`, which holds more than a record."""
    record = folder / RECORD_FILE
    marker = folder / {"sae": "cfg.json", "labels": LABELS_FILE}[kind]
    if kind not in run.preparation or not record.is_file() or not marker.is_file():
        return False
    return bool(files.read_json(record).get("fingerprint") == run.preparation[kind]["fingerprint"])


def _learned_as_stored(run: Run, folder: Path) -> bool:
    """Return whether the run learned the teacher's labels, not others that were computed from them."""
    recipe = recipe_of_run(run.recipe, folder)
    config = recipe.labels_of(recipe.students[run.name])
    return config == config.base()


def _files(folder: Path, prefix: str) -> Iterator[CommitOperationAdd]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in STAGE_FILES:  # which concern this machine
            yield CommitOperationAdd(f"{prefix}{path.relative_to(folder).as_posix()}", path)


def _upload(api: HfApi, repo_id: str, kind: str, operations: list[CommitOperationAdd], private: bool | None) -> Upload:
    url = api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
    api.create_commit(repo_id, operations, repo_type=kind, commit_message=f"Upload with cocomix {__version__}")
    return Upload(str(url), len(operations))


def _asked(upload: Callable[[], Upload]) -> Upload:
    """Call the Hub; its refusals become one line without the token.

    Raises:
        InputError: it refuses, or cannot be reached.
    """
    try:
        return upload()
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx.HTTPError) as error:
        reason = error_message(error)
        if token := get_token():
            reason = reason.replace(token, "…")
        reason = re.sub(r"hf_\w+", "…", reason)
        raise InputError(
            f"the Hub does not take the upload ({type(error).__name__}: {reason:.300}); log in with `hf auth login` or "
            "set HF_TOKEN, and give a repository that you may write to"
        ) from None
