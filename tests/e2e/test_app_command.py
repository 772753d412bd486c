"""`cocomix app` through the command line; what the page does, tests/browser sees."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import sys
import urllib.error
import urllib.request

import pytest

from cocomix.app.generating import generate_both
from cocomix.app.predictability import Predictability
from cocomix.app.snippets import as_command, as_python
from cocomix.app.steering_controls import steering_of
from cocomix.cli import app
from cocomix.cli.main import main
from cocomix.inspection.generation import GenerationSettings
from cocomix.inspection.runs import open_run
from cocomix.models.steering import Operation


def error(capsys) -> str:
    """What the command said was wrong: one line."""
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("cocomix: ")]
    return line


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_it_serves_until_it_is_interrupted(catalogued, monkeypatch, capsys):
    port, seen = free_port(), []

    def look() -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
            seen.append((answer.headers["content-security-policy"], answer.read().decode()))
        multipart = {"content-type": "multipart/form-data; boundary=x"}
        upload = urllib.request.Request(f"http://127.0.0.1:{port}/gradio_api/upload", b"--x--", multipart)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(upload, timeout=20)
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "wait", look)
    assert main(["app", str(catalogued / "students" / "cocomix"), "--port", str(port)]) == 0
    said = capsys.readouterr()
    assert f"Page: http://127.0.0.1:{port}" in said.out
    assert "Warning" not in said.err
    ((policy, page),) = seen
    assert "default-src 'self'" in policy
    assert "fonts.googleapis" not in page


def test_another_host_is_warned_of(finished, monkeypatch, capsys):
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "wait", stop)
    run = finished.folder / "out" / "students" / "cocomix"
    assert main(["app", str(run), "--host", "0.0.0.0", "--port", str(free_port())]) == 0
    said = capsys.readouterr().err
    assert "Warning: the page is served on 0.0.0.0 without a password, to everybody who can reach it" in said
    assert "This run has no concept catalog, so concepts have only numbers" in said


def test_copied_command_and_python_give_the_text_of_the_page(finished, capsys):
    folder = finished.folder / "out" / "students" / "cocomix"
    run, prompt, settings = open_run(folder), "- the river 'crosses'\n", GenerationSettings(max_new_tokens=6)
    operations = [Operation("set", 3, 30.0), Operation("scale", 7, 0.5), Operation("suppress", 9)]
    *_, texts = generate_both(run, prompt, settings, steering_of(operations, "1-3,5-"), 60)
    how = (folder, prompt, settings, operations, "1-3,5-")
    assert main(["generate", "--json", *shlex.split(as_command(*how))[2:]]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["plain"], said["steered"]) == ([texts.plain], [texts.steered])
    exec(as_python(*how), {})
    assert capsys.readouterr().out == prompt + texts.steered + "\n"


def test_a_port_that_is_taken(finished, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["app", str(finished.folder / "out" / "students" / "cocomix"), "--port", str(port)]) == 2
    assert f"cannot serve on 127.0.0.1, port {port}" in error(capsys)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--port", "99999", "--port is 99999; expected a whole number from 1 to 65,535"),
        ("--host", "a b", "cannot serve on a b"),
        ("--host", "192.0.2.1", "cannot serve on 192.0.2.1"),
        ("--host", "::1", "does not support IPv6"),
    ],
)
def test_an_address_that_cannot_be(tmp_path, capsys, option, value, said):
    assert main(["app", str(tmp_path), option, value]) == 2
    assert said in error(capsys)


def test_a_model_without_concepts(finished, capsys):
    assert main(["app", str(finished.folder / "out" / "students" / "ntp")]) == 2
    assert "mixes no concepts in; give a run of method cocomix" in error(capsys)


def test_no_such_run(tmp_path, capsys):
    assert main(["app", str(tmp_path / "nowhere")]) == 2
    assert "it has no config.json; give the output folder of a recipe" in error(capsys)


def test_a_time_limit_that_cannot_be(tmp_path, capsys):
    assert main(["app", str(tmp_path), "--time-limit", "0"]) == 2
    assert "--time-limit is 0; expected a number from 1 to 3,600" in error(capsys)


def test_without_gradio(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", str(tmp_path)]) == 2
    assert "install it with: pip install 'cocomix[app]'" in error(capsys)


def test_predictions_are_judged_by_the_labels_that_the_run_learnt(recipe):
    student = {"method": "cocomix", "mixer": {"insert_layer": 1}}
    runner = recipe(students={"cocomix": student, "other": student | {"labels": {"labels_per_token": 1}}})
    assert runner("train") == 0
    output = runner.folder / "out"
    opened = {name: open_run(output / "students" / name) for name in ("cocomix", "other")}
    counts = {name: Predictability(run).count() for name, run in opened.items()}
    assert counts["cocomix"].labels.sum() > counts["other"].labels.sum() == counts["other"].tokens
    (own,) = output.glob("labels-*")
    shutil.rmtree(own)
    gone = Predictability(opened["other"])
    assert gone.count() is None
    assert gone.missing.startswith(f"not known: no labeled corpus at {own}")
