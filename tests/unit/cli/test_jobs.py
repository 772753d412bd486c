"""Several trainings at a time: labeled lines, exit codes, and an interruption that stops all of them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from cocomix.cli.jobs import Trainings


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_each_line_has_the_label_of_its_training_and_the_rest_finish(capsys: pytest.CaptureFixture[str]) -> None:
    commands = {
        "a": python("print('one'); print(); print('two')"),
        "b": python("import sys; sys.stderr.write('wrong\\n'); sys.exit(2)"),
        "c": python("print('three')"),
    }
    assert Trainings(jobs=2).run(commands) == {"a": 0, "b": 2, "c": 0}
    assert sorted(capsys.readouterr().err.splitlines()) == ["[a] one", "[a] two", "[b] wrong", "[c] three"]


def test_an_interruption_reaches_every_training_and_starts_no_other(tmp_path: Path) -> None:
    wait = (
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1] + '.started').touch()\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    pathlib.Path(sys.argv[1] + '.kept').touch()"
    )
    commands = {name: [*python(wait), str(tmp_path / name)] for name in "abc"}

    def interrupt() -> None:
        while len(list(tmp_path.glob("*.started"))) < 2:
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in jobs in the background
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        Trainings(jobs=2).run(commands)
    signal.signal(signal.SIGINT, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.kept", "a.started", "b.kept", "b.started"]
