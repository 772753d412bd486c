"""Commands, one after another, in each of several processes; torchrun starts this with a JSON file of argument lists.

Beside it, `PROCESS.json` tells for each training whether this process kept just a share of the weights, and
`documents-PROCESS.json` which texts it has read of streamed corpora. With `DIE_AT` in the environment, a process dies
once it has written the checkpoint of that step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMANDS = "commands.json"


def run_in_several(processes: int, folder: Path, commands: list[list[str]], **environment: str) -> str:
    """Start them, wait, and return what they printed; a process that fails is not looked at here."""
    folder.mkdir(exist_ok=True)
    (folder / COMMANDS).write_text(json.dumps(commands))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    found = subprocess.run(
        [*launch, __file__, str(folder / COMMANDS)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **environment},
    )
    return f"{found.stdout}{found.stderr}\nexit code {found.returncode}"


def _work(commands: Path) -> int:
    from torch.distributed.tensor import DTensor

    from cocomix.cli import main
    from cocomix.data.streaming import TextDocuments
    from cocomix.training.trainer import ObjectiveTrainer

    sharded: list[bool] = []
    streamed: set[str] = set()
    train, save_checkpoint = ObjectiveTrainer.train, ObjectiveTrainer._save_checkpoint
    encode = TextDocuments.encode

    def watched_train(trainer: ObjectiveTrainer, **arguments: Any) -> None:
        train(trainer, **arguments)
        sharded.append(all(isinstance(weight, DTensor) for weight in trainer.model.parameters()))

    def watched_checkpoint(trainer: ObjectiveTrainer, *arguments: Any) -> None:
        save_checkpoint(trainer, *arguments)
        if str(trainer.state.global_step) == os.environ.get("DIE_AT"):
            os.kill(os.getpid(), signal.SIGKILL)

    def watched_encode(documents: TextDocuments, contents: list[bytes]) -> Any:
        streamed.update(content.decode() for content in contents)
        return encode(documents, contents)

    TextDocuments.encode = watched_encode  # type: ignore[method-assign]
    ObjectiveTrainer.train = watched_train  # type: ignore[method-assign]
    ObjectiveTrainer._save_checkpoint = watched_checkpoint  # type: ignore[method-assign]
    for arguments in json.loads(commands.read_text()):
        if code := main(arguments):
            return code
    commands.with_name(f"{os.environ['RANK']}.json").write_text(json.dumps(sharded))
    commands.with_name(f"documents-{os.environ['RANK']}.json").write_text(json.dumps(sorted(streamed)))
    return 0


if __name__ == "__main__":
    sys.exit(_work(Path(sys.argv[1])))
