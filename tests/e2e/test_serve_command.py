"""`cocomix serve` through the command line; what it answers, tests/unit/serving sees."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cocomix.cli.main import main
from cocomix.inspection.generation import GenerationSettings, continuations
from cocomix.inspection.runs import open_run
from cocomix.models.steering import Steering


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def error(capsys) -> str:
    """What the command said was wrong: one line."""
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("cocomix: ")]
    return line


def test_curl_gets_steered_text_until_the_server_is_terminated(catalogued):
    run, port = catalogued / "students" / "cocomix", free_port()
    arguments = ["serve", str(run), "--port", str(port), "--api-key", "secret"]
    with subprocess.Popen(
        [sys.executable, "-m", "cocomix", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout
        assert server.stdout.readline() == f"Endpoint: http://127.0.0.1:{port}/v1\n"
        body = {"prompt": "The river", "max_tokens": 8, "temperature": 0, "steering": ["3=+20"], "concepts": True}
        asked = ["curl", "--silent", "--show-error", f"http://127.0.0.1:{port}/v1/completions", "--data", "@-"]
        found = subprocess.run(
            [*asked, "--header", "authorization: Bearer secret"], input=json.dumps(body), capture_output=True, text=True
        )
        server.send_signal(signal.SIGTERM)
        rest, said = server.communicate(timeout=60)
    opened = open_run(run)
    settings = GenerationSettings(max_new_tokens=8)
    (choice,) = json.loads(found.stdout)["choices"]
    assert choice["text"] == continuations(opened, "The river", settings, Steering.add({3: 20.0}))[0]
    assert choice["concepts"][0]["concepts"][0]["name"] in opened.names.values()
    assert (server.returncode, rest) == (0, "")
    assert "Traceback" not in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "99999"], "--port is 99999; expected a whole number from 1 to 65,535"),
        (["--host", "192.0.2.1"], "cannot serve on 192.0.2.1, port 8000"),
        (["--time-limit", "0"], "--time-limit is 0; expected a number from 1"),
        (["--api-key", "a b "], "--api-key is empty or has characters that no HTTP header can hold"),
        (["--catalog", "catalog"], "mixes in no concepts; leave it out"),
    ],
)
def test_options_that_cannot_be(finished, capsys, options, said):
    assert main(["serve", str(finished.folder / "out" / "students" / "ntp"), *options]) == 2
    assert said in error(capsys)


def test_no_such_run(tmp_path: Path, capsys):
    assert main(["serve", str(tmp_path / "nowhere")]) == 2
    assert "it has no config.json" in error(capsys)


def test_without_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(tmp_path)]) == 2
    assert "serving needs uvicorn; install it with: pip install 'cocomix[serve]'" in error(capsys)
