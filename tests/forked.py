"""Processes that a test may kill, forked from a server that has loaded the libraries once."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "cocomix.cli.main",
        "cocomix.cli.workflow",
        "matplotlib.figure",
        "transformers.models.gpt2.modeling_gpt2",
    ]
)


def start(work: Callable[..., int], *arguments: object, log: Path, **environment: str) -> BaseProcess:
    """Start a process that ends with the exit code that `work(*arguments)` returns, its output appended to `log`."""
    process = SERVER.Process(target=_work, args=(work, arguments, log, environment))
    process.start()
    return process


def start_several(
    processes: int, work: Callable[..., int], *arguments: object, log: Path, **environment: str
) -> list[BaseProcess]:
    """Start processes that find each other, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), **environment}
    return [
        start(work, *arguments, log=log, RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in range(processes)
    ]


def exit_codes(*processes: BaseProcess) -> list[int | None]:
    """Wait for processes; kill those that take minutes."""
    for process in processes:
        process.join(timeout=400)
        process.kill()
    return [process.exitcode for process in processes]


def command(arguments: list[str]) -> int:
    """Run `cocomix` with these arguments."""
    from cocomix.cli.main import main

    return main(arguments)


def commands(each: list[list[str]]) -> int:
    """Run `cocomix` with each of these arguments, until one fails."""
    return next((code for arguments in each if (code := command(arguments))), 0)


def _work(work: Callable[..., int], arguments: tuple[object, ...], log: Path, environment: dict[str, str]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    faulthandler.enable(2)  # a crash leaves a traceback
    sys.exit(work(*arguments))
