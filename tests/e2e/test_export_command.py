"""`cocomix export`: results without weights, weights in another dtype and in small files, and plain decoders."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cocomix
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
        limited.setattr(bundles, "MAX_BYTES", 9000)
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


STOCK = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.modules["cocomix"] = None  # any import of it now fails
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    ids = AutoTokenizer.from_pretrained(folder)("The river holds the stone.", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save((type(model).__name__, ids, model(ids).logits), f"{folder}/results")
"""
CONVERTER = """
import sys
from pathlib import Path

from conversion import TextModel

folder, options = Path(sys.argv[1]), dict(zip(sys.argv[2::2], sys.argv[3::2]))
names = " ".join(sorted(path.name for path in folder.iterdir()))
found = f"{TextModel().get_vocab_base_pre(None)} {options['--outtype']} {names}"
Path(options["--outfile"]).write_text(found)
"""


@pytest.fixture
def unmixed(
    finished: Runner, tmp_path: Path, backbone_config: Callable[..., Any], redraw: Callable[..., None]
) -> Callable[..., Path]:
    """unmixed("llama"): the folder of a saved student that mixes nothing in, with the tiny run's tokenizer."""

    def save(kind: str, **settings: object) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(finished.folder / "out" / "students" / "ntp")
        config = cocomix.CoCoMixConfig(
            backbone_config(kind, vocab_size=len(tokenizer)),
            insert_layer=1,
            num_concepts=40,
            num_active_concepts=5,
            **{"mixing": "none", **settings},
        )
        model = cocomix.CoCoMixForCausalLM(config)
        redraw(model)
        folder = tmp_path / f"{kind}-student"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@torch.no_grad()
def test_students_without_mixing_become_plain_decoders(
    unmixed: Callable[..., Path], tmp_path: Path, relative_error: Callable[..., float]
) -> None:
    kinds = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    for kind in kinds:
        assert main(["export", str(unmixed(kind)), str(tmp_path / kind), "--to", "transformers"]) == 0
        assert not [*(tmp_path / kind).glob("*.py")] and "cocomix" not in (tmp_path / kind / "config.json").read_text()
    subprocess.run([sys.executable, "-c", STOCK, *(tmp_path / kind for kind in kinds)], check=True)
    for kind, name in kinds.items():
        found, ids, logits = torch.load(tmp_path / kind / "results")
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-student").eval()(ids).logits
        assert found == name and relative_error(logits, wanted) < 1e-6


def test_plain_students_export_as_they_are_and_others_are_refused(
    finished: Runner, unmixed: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = finished.folder / "out" / "students" / "ntp", tmp_path / "plain"
    assert main(["export", str(source), str(target), "--to", "transformers", "--dtype", "bf16"]) == 0
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (target, source))
    assert all(torch.equal(ours[name], weight.bfloat16()) for name, weight in theirs.items())
    for settings in ({"mixing": "add"}, {"mixing": "interleave"}, {"content": "pause", "mixing": "add"}):
        line = refusal(capsys, "export", unmixed("gpt2", **settings), tmp_path / "new", "--to", "transformers")
        assert "cannot become a plain decoder" in line and "--to model" in line and "mixing: none" in line
    assert not (tmp_path / "new").exists()


def test_gguf_is_written_by_the_converter_that_is_given(
    unmixed: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target, converter = unmixed("gpt2"), tmp_path / "model.gguf", tmp_path / "convert_hf_to_gguf.py"
    gguf = ("export", source, target, "--to", "gguf")
    assert "give --converter PATH" in refusal(capsys, *gguf)
    assert "no converter at" in refusal(capsys, *gguf, "--converter", converter)
    converter.write_text("raise KeyError('n_ctx')")
    (tmp_path / "conversion.py").write_text(
        "class TextModel:\n    def get_vocab_base_pre(self, tokenizer):\n        raise NotImplementedError\n"
    )
    assert "(KeyError: 'n_ctx')" in refusal(capsys, *gguf, "--converter", converter)
    assert not [*tmp_path.glob("model*")]
    converter.write_text(CONVERTER)
    assert main([*map(str, gguf), "--converter", str(converter), "--dtype", "fp16"]) == 0
    pre_tokenizer, kind, *names = target.read_text().split()
    assert (pre_tokenizer, kind) == ("gpt-2", "f16") and {"config.json", "tokenizer.json"} <= {*names}
    assert "model.gguf exists" in refusal(capsys, *gguf, "--converter", converter)
