"""Commands, one after another, in each of several processes.

Next to their log, `PROCESS.json` records for each training whether this process kept just a share of the weights, and
`documents-PROCESS.json` which texts it has read of streamed corpora. With `DIE_AT` in the environment, a process dies
once it has written the checkpoint of that step.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import forked


def run_in_several(processes: int, folder: Path, commands: list[list[str]], **environment: str) -> str:
    """Start them, wait, and return what they printed; the last line has their exit codes."""
    folder.mkdir(exist_ok=True)
    log = folder / "log"
    log.unlink(missing_ok=True)
    codes = forked.exit_codes(*forked.start_several(processes, _work, commands, folder, log=log, **environment))
    return f"{log.read_text()}\nexit codes {codes}"


def _work(commands: list[list[str]], folder: Path) -> int:
    from torch.distributed.tensor import DTensor

    from cocomix.cli.main import main
    from cocomix.concepts import sae_training
    from cocomix.data.streaming import TextDocuments
    from cocomix.training.trainer import ObjectiveTrainer

    sharded: list[bool] = []
    streamed: set[str] = set()
    train, save_checkpoint = ObjectiveTrainer.train, ObjectiveTrainer._save_checkpoint
    save_sae_checkpoint, encode = sae_training._save_checkpoint, TextDocuments.encode

    def watched_train(trainer: ObjectiveTrainer, **arguments: Any) -> None:
        train(trainer, **arguments)
        sharded.append(all(isinstance(weight, DTensor) for weight in trainer.model.parameters()))

    def watched_checkpoint(trainer: ObjectiveTrainer, *arguments: Any) -> None:
        save_checkpoint(trainer, *arguments)
        if str(trainer.state.global_step) == os.environ.get("DIE_AT"):
            os.kill(os.getpid(), signal.SIGKILL)

    def watched_sae_checkpoint(trainer: sae_training.SAETrainer, folder: Path) -> None:
        save_sae_checkpoint(trainer, folder)
        if str(trainer.step) == os.environ.get("DIE_AT"):
            os.kill(os.getpid(), signal.SIGKILL)

    def watched_encode(documents: TextDocuments, contents: list[bytes]) -> Any:
        streamed.update(content.decode() for content in contents)
        return encode(documents, contents)

    sae_training._save_checkpoint = watched_sae_checkpoint
    TextDocuments.encode = watched_encode  # type: ignore[method-assign]
    ObjectiveTrainer.train = watched_train  # type: ignore[method-assign]
    ObjectiveTrainer._save_checkpoint = watched_checkpoint  # type: ignore[method-assign]
    for arguments in commands:
        if code := main(arguments):
            return code
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(sharded))
    (folder / f"documents-{os.environ['RANK']}.json").write_text(json.dumps(sorted(streamed)))
    return 0
