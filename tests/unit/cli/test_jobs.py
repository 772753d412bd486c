"""Several processes at a time: labeled lines, exit codes, order, and an interruption that stops all of them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cocomix.cli import jobs
from cocomix.cli.jobs import SKIPPED, Processes, Task


def python(code: str) -> Callable[[], None]:
    return partial(exec, code)


def test_each_line_has_the_label_of_its_task_and_the_rest_finish(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [
        Task("late", python("print('four')"), frozenset({"a", "c"})),
        Task("never", python("print('five')"), frozenset({"a", "b"})),
        Task("a", python("print('one'); print(); print('two')")),
        Task("b", python("from cocomix.common.errors import InputError; raise InputError('wrong')")),
        Task("c", python("print('three')")),
    ]
    assert Processes(jobs=2).run(tasks) == {"late": 0, "never": SKIPPED, "a": 0, "b": 2, "c": 0}
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == ["[a] one", "[a] two", "[b] cocomix: wrong", "[c] three", "[late] four"]
    assert lines[-1] == "[late] four"


def test_every_task_has_its_own_exit_code_however_many_end_while_others_start() -> None:
    codes = {str(number): number % 2 for number in range(60)}
    tasks = [Task(label, python(f"raise SystemExit({code})")) for label, code in codes.items()]
    assert Processes(jobs=4).run(tasks) == codes


def test_a_reader_that_closes_the_output_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(line: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(jobs, "warn", closed)
    tasks = [Task("a", python("import time; time.sleep(60)")), Task("b", python("print('one')"))]
    with pytest.raises(BrokenPipeError):
        Processes(jobs=2).run([*tasks, Task("late", python(""), frozenset({"b"}))])


def test_an_interruption_reaches_every_process_and_starts_no_other(tmp_path: Path) -> None:
    def interrupt() -> None:
        while len(list(tmp_path.glob("*.started"))) < 2:
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    wait = (
        "import pathlib, time\n"
        "pathlib.Path({name!r} + '.started').touch()\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    pathlib.Path({name!r} + '.kept').touch()"
    )
    tasks = [Task(name, python(wait.format(name=str(tmp_path / name)))) for name in "abc"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in jobs in the background
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        Processes(jobs=2).run(tasks)
    signal.signal(signal.SIGINT, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.kept", "a.started", "b.kept", "b.started"]
