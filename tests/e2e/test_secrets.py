"""No secret of the environment or of an address gets into what the commands write and print."""

from __future__ import annotations

from pathlib import Path

import pytest

from cocomix.cli.main import main

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COCOMIX_API_KEY", "OPENAI_API_KEY", "NETRC")
SECRET = "planted-9f31c7"


def holders(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_secrets_stay_out_of_every_output(recipe, monkeypatch, capsys, caplog, tmp_path):
    for variable in VARIABLES:
        monkeypatch.setenv(variable, f"{SECRET}-{variable}")
    runner, students = recipe(), tmp_path / "out" / "students"
    assert runner("run") == runner("concepts") == 0
    compared = [str(students / name) for name in ("cocomix", "ntp")]
    assert main(["compare", *compared, "--output", str(tmp_path / "rep")]) == 0
    assert main(["inspect", "The river", "--run", compared[0], "--html", str(tmp_path / "trace.html")]) == 0
    unreachable = ["--endpoint", "http://127.0.0.1:9/v1", "--model", "small", "--limit", "1"]
    monkeypatch.setattr("cocomix.catalog.endpoint.WAITS_SECONDS", ())
    assert main(["concepts", "name", "--catalog", str(tmp_path / "out" / "catalog"), *unreachable]) == 2
    assert len(list(tmp_path.rglob("*"))) > 30
    assert holders(tmp_path) == []
    printed = "".join(capsys.readouterr()) + caplog.text
    assert "connection failed" in printed and SECRET not in printed


@pytest.mark.parametrize(
    "key", ["corpus.source", "teacher.source", "backbone.source", "sae.source", "tokenizer.source"]
)
def test_a_password_in_an_address_is_refused_and_not_shown(key, recipe, capsys, tmp_path):
    section, _, name = key.partition(".")
    address = f"https://user:{SECRET}@example.com/data"
    assert recipe(**{section: {name: address}})("run") == 2
    assert recipe()("run", f"--{key}", address) == 2
    assert recipe()("run", f"--{key}", address, "--corpus.block", "1") == 2
    printed = capsys.readouterr().err
    assert f"{key} is a URL with a user name or password" in printed
    assert SECRET not in printed
    assert [path.name for path in holders(tmp_path)] == []
