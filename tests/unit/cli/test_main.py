"""What the system refuses, and what interrupts a command, takes one line."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from cocomix.cli import doctor, main, options
from cocomix.cli.examples import EXAMPLES
from cocomix.common import starting
from cocomix.common.console import show
from cocomix.common.errors import InputError
from cocomix.common.settings import kind_of
from cocomix.pipeline.recipe import Recipe

INTERRUPTED_AT_AN_IMPORT = """
import os, signal, sys

class Interrupt:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background without it
sys.meta_path.insert(0, Interrupt)
sys.orig_argv = [sys.executable, *sys.argv[1:]]
from cocomix.cli.main import main
main(["compare", "runs/none"])
"""


def raising(error: BaseException) -> Callable[[list[str]], int]:
    def run(_: list[str]) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("one\ntwo"), 2, "cocomix: one\ncocomix: two\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "out/corpus"),
            2,
            "cocomix: out/corpus: Permission denied: ",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "cocomix: No space left on device: free some space; "),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "page"), 2, "cocomix: page: Is a directory\n"),
        (OSError("gpt9 is not a model\n\nor a folder"), 2, "cocomix: gpt9 is not a model or a folder\n"),
        (KeyboardInterrupt(), 130, "\ncocomix: interrupted; "),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_failures_take_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    monkeypatch.setattr(main, "_dispatch", raising(error))
    assert main.main([]) == code
    told = capsys.readouterr().err
    assert told.startswith(line) and told.count("cocomix: ") == line.count("cocomix: ")


def test_the_end_of_another_process_takes_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer")
    monkeypatch.setattr(main, "_dispatch", raising(lost))
    with pytest.raises(RuntimeError):
        main.main([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["/usr/bin/cocomix", "run", "/home/x/r.yaml"])
    assert main.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cocomix: process 0 lost the connection to another one, ")
    assert line.endswith("; to resume, run: cocomix run /home/x/r.yaml")


def test_mistakes_of_the_program_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "_dispatch", raising(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"):
        main.main([])


@pytest.mark.parametrize(
    ("output", "encoding", "code", "told"),
    [
        (
            "/dev/full",
            "utf-8",
            2,
            "cocomix: the results cannot be written to standard output: No space left on device\n",
        ),
        ("pipe that nobody reads", "utf-8", 141, ""),
        ("/dev/null", "latin-1", 0, ""),
        (None, "utf-8", 0, ""),
    ],
)
def test_results_that_cannot_be_printed(
    tmp_path: Path, output: str | None, encoding: str, code: int, told: str
) -> None:
    child = os.fork()
    if child == 0:
        sys.stderr = (tmp_path / "err").open("w")
        if output is None:
            sys.stdout = None  # type: ignore[assignment]
        elif output == "pipe that nobody reads":
            read, write = os.pipe()
            os.close(read)
            sys.stdout = os.fdopen(write, "w", encoding=encoding)
        else:
            sys.stdout = os.fdopen(os.open(output, os.O_WRONLY), "w", encoding=encoding)
        main._dispatch = lambda _: show("loss 1.0 – 2.0") or 0  # type: ignore[func-returns-value]
        found = main.main([])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(found)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert (tmp_path / "err").read_text() == told


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["-m", "cocomix", "run", "r.yaml"], 130, "\ncocomix: interrupted while starting; nothing was changed\n"),
        (["-m", "somebody.elses"], -signal.SIGINT, "KeyboardInterrupt\n"),
    ],
)
def test_an_interruption_while_the_libraries_load(arguments: list[str], code: int, told: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED_AT_AN_IMPORT, *arguments]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == code and found.stderr.endswith(told)
    assert ("Traceback" in found.stderr) == (code != 130)


def test_interruptions_are_exceptions_again_once_a_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "cocomix"])
    try:
        starting.exit_quietly_while_loading()
        assert signal.getsignal(signal.SIGINT) not in (before, signal.default_int_handler)
        starting.raise_interruptions()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_help_fits_on_a_screen_and_lists_the_commands_in_the_order_of_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= main.WIDTH
    listed = [line.strip() for line in lines[lines.index("Start:") :]]
    names = [name for panel, commands in main.COMMANDS.items() for name in (f"{panel}:", *commands)]
    positions = [next(i for i, line in enumerate(listed) if line.startswith(name)) for name in names]
    assert positions == sorted(positions)


def test_every_command_has_a_help_text() -> None:
    texts = main.help_texts()
    assert list(texts) == ["cocomix", *(f"cocomix {name}" for panel in main.COMMANDS.values() for name in panel)]
    for name, text in texts.items():
        assert text.startswith(f"Usage: {name} ") and len(text.splitlines()) <= 45


def test_every_example_in_the_help_can_be_read() -> None:
    tree = main.command_tree()
    assert EXAMPLES.keys() <= tree.commands.keys()
    for command, examples in EXAMPLES.items():
        for example in examples:
            words = shlex.split(example)
            with tree.make_context("cocomix", ["x"], resilient_parsing=True) as root:
                name, found, arguments = tree.resolve_command(root, words[words.index("cocomix") + 1 :])
            assert name == command
            keys = found.make_context(name, arguments).args
            assert all(kind_of(Recipe, key.removeprefix("--")) for key in keys if key.startswith("--")), example


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["run", "--help"], ["generate", "--help"], ["compare"]]
)
def test_what_needs_no_libraries_loads_none(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "cocomix", *arguments]
    loaded = {
        line.split("|")[-1].strip()
        for line in subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
    }
    assert "cocomix.cli.main" in loaded and not {"torch", "transformers", "datasets", "numpy"} & loaded


def test_an_import_loads_the_models_only_and_every_public_name_when_it_is_used() -> None:
    code = """
import sys
import cocomix
from transformers import AutoConfig
print(sorted({name.split(".")[1] for name in sys.modules if name.startswith("cocomix.")}))
assert set(cocomix.__all__) <= set(dir(cocomix))
assert all(getattr(cocomix, name).__module__.startswith("cocomix.") for name in cocomix.__all__)
assert AutoConfig.for_model("cocomix", backbone_config={"model_type": "gpt2"}).backbone_config.model_type == "gpt2"
cocomix.nothing
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "['common', 'models']\n"
    assert done.stderr.endswith("AttributeError: module 'cocomix' has no attribute 'nothing'\n")


def test_warnings_of_libraries_are_shown_but_for_those_to_developers() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        options.load_libraries()
        for category in (UserWarning, RuntimeWarning, FutureWarning, DeprecationWarning):
            warnings.warn_explicit("said", category, "optimizer.py", 1, module="torch.optim")
    assert [each.category for each in shown] == [UserWarning, RuntimeWarning]


@pytest.mark.parametrize("words, found", [("cocomix exp", "export"), ("cocomix export --max", "--max-shard-size")])
def test_a_shell_completes_commands_and_options(words: str, found: str) -> None:
    state = {"_COCOMIX_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-m", "cocomix"], env={**os.environ, **state}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [found]


def test_doctor_shows_the_installation_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 15 and {"versions", "hardware", "extras", "cache"} <= {line.split()[0] for line in lines}
    assert "torch" in lines[0] and main.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {line.split()[0] for line in lines}


def test_missing_packages_of_an_extra_are_named() -> None:
    requirements = ["torch>=2", 'nothing-such>=1; extra == "app"', "pytest ; extra == 'app'", 'other; extra == "eval"']
    assert doctor.missing_packages("app", requirements) == ["nothing-such"]
