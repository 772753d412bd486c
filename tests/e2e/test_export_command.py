"""`cocomix export`: results that travel without weights, and weights in another dtype and in small files."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cocomix  # noqa: F401
from cocomix.cli.main import main
from cocomix.reporting import bundles
from tiny_run import Runner


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(each) for each in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def compared(capsys: pytest.CaptureFixture[str], *paths: Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["compare", *map(str, paths), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return {key: found[key] for key in ("students", "groups", "comparisons", "equal_cost")}


def test_bundles_are_compared_as_their_folders_are(
    finished: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    output = finished.folder / "out"
    students = [output / "students" / name for name in ("ntp", "cocomix")]
    wanted = compared(capsys, *students)
    assert compared(capsys, output) == wanted
    assert main(["export", str(output), "--to", "bundle"]) == 0
    bundle = tmp_path / "out.tar.gz"
    assert bundle.stat().st_size < 100_000
    assert compared(capsys, bundle) == wanted
    for student in students:  # from several machines
        assert main(["export", str(student), "--to", "bundle", f"{student.name}.tgz"]) == 0
    assert compared(capsys, tmp_path / "ntp.tgz", tmp_path / "cocomix.tgz") == wanted
    assert main(["compare", str(bundle), "--output", "report"]) == 0
    assert "cocomix" in (tmp_path / "report" / "report.md").read_text()
    assert "choose another file" in refusal(capsys, "export", output, "--to", "bundle")
    assert "--dtype has no effect" in refusal(capsys, "export", output, "--to", "bundle", "b", "--dtype", "bf16")
    assert "no finished run" in refusal(capsys, "export", tmp_path, "--to", "bundle", "b")


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.size, found.linkname = kind, size, "/etc/passwd"
    return found


@pytest.mark.parametrize(
    "wrong",
    [
        member("../run.json"),
        member("students/../run.json"),
        member("/students/a/run.json"),
        member("students/a/b/run.json"),
        member("students/a/model.safetensors"),
        member("students/a/run.json", tarfile.SYMTYPE),
        member("students/a/run.json", tarfile.LNKTYPE),
        member("students/a", tarfile.DIRTYPE),
    ],
    ids=lambda each: f"{each.name} {each.type!r}",
)
def test_a_bundle_holds_nothing_but_results(
    wrong: tarfile.TarInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "bundle.tgz", "w:gz") as archive:
        archive.addfile(wrong)
    assert "is not part of a bundle" in refusal(capsys, "compare", tmp_path / "bundle.tgz")
    assert not (tmp_path / "run.json").exists()


def test_large_and_damaged_bundles_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle.tgz"
    with tarfile.open(bundle, "w:gz") as archive:
        archive.addfile(member("students/a/run.json", size=9000), io.BytesIO(bytes(9000)))
    with monkeypatch.context() as limited:
        limited.setattr(bundles, "MOST_BYTES", 9000)
        assert "holds more than 9,000 bytes" in refusal(capsys, "compare", bundle)
    bundle.write_bytes(bundle.read_bytes()[:-20])
    assert "cannot be read as a bundle" in refusal(capsys, "compare", bundle)
    bundle.write_text("no archive")
    assert "cannot be read as a bundle" in refusal(capsys, "compare", bundle)


def test_exported_weights_are_smaller_and_load(
    finished: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = shutil.copytree(finished.folder / "out" / "students" / "cocomix", tmp_path / "cocomix")
    assert main(["export", "cocomix", "--dtype", "bf16", "--max-shard-size", "15KB"]) == 0
    target = tmp_path / "cocomix-bf16"
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 1 and all(path.stat().st_size < 25_000 for path in shards)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (target, source))
    assert ours.dtype == torch.bfloat16
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight.bfloat16()), name
    assert AutoTokenizer.from_pretrained(target).get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()
    assert "cocomix-bf16 exists" in refusal(capsys, "export", "cocomix", "--dtype", "bf16")
    assert "expected a size such as 15MB" in refusal(capsys, "export", "cocomix", "new", "--max-shard-size", "tiny")
    assert "does not load" in refusal(capsys, "export", "nothing", "new") and not (tmp_path / "new").exists()
