"""The slices of the study: their recipes can be planned, their files travel, and a miniature packs its results."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cocomix.pipeline.recipe_file import load_recipe
from cocomix.planning.costs import machines
from cocomix.planning.plan import plan_recipe

ROOT = Path(__file__).parents[2]
slices = importlib.import_module("slice")  # in benchmarks


def test_every_slice_has_its_recipes_and_resizes_its_students(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    named = {name for each in slices.SLICES.values() for name in (each.corpus, *each.recipes)}
    assert named == {path.stem for path in (ROOT / "recipes" / "slices").glob("*.yaml")}
    s1 = slices.resized(slices.load("s1", Path("elsewhere")), max_tokens=8_192_000, tokens_per_step=32_768)
    assert s1["output"] == "elsewhere/s1" and s1["corpus"]["source"] == "elsewhere/corpus-4096/corpus"
    assert (s1["training"]["max_tokens"], s1["training"]["blocks_per_batch"]) == (8_192_000, 128)
    assert s1["students"]["ntp-total"]["training"]["max_tokens"] == 2 * 8_192_000  # and the teacher's
    a1 = slices.resized(slices.load("a1", slices.WORK), max_tokens=58_982_400, tokens_per_step=None)
    assert a1["students"]["add-d1"]["training"]["max_tokens"] == 58_982_400 // 4


def test_inputs_and_results_travel(tmp_path: Path) -> None:
    corpus, inputs, work = tmp_path / "corpus", tmp_path / "inputs", tmp_path / "work"
    for name in ("corpus.json", "documents/train/text", "documents/validation/text"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text(name)
    inputs.mkdir()
    slices.pack_folder(corpus, "c/corpus", inputs / "c.tar.zst", without=slices.LEFT_AT_HOME)
    slices.pack_folder(corpus, "g1-sae", inputs / "g1-sae.tar.zst")
    slices.unpack_inputs(inputs, work)
    found = {path.relative_to(work).as_posix() for path in (work / "c").rglob("*") if path.is_file()}
    assert found == {"c/corpus/corpus.json", "c/corpus/documents/validation/text"}
    recipe = slices.with_given({"sae": {"d_sae": 4}, "teacher": {}}, work)
    assert recipe == {"sae": {"d_sae": 4, "source": str(work / "g1-sae")}, "teacher": {}}
    (work / "large").write_bytes(bytes(slices.MAX_FILE_BYTES + 1))
    with pytest.raises(SystemExit, match="more than 8 files or 15,000,000 bytes"):
        slices.check_sizes(work)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "slices").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_of_a_slice_can_be_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = plan_recipe(load_recipe(path), machines("h100", 1, 0.2), 29_000_000)
    assert [student.name for student in plan.students] == [*load_recipe(path).students]


@pytest.mark.slow
def test_a_miniature_packs_the_results_of_all_students(tmp_path: Path) -> None:
    text = tmp_path / "text"
    for folder in ("train", "val"):
        (text / folder).mkdir(parents=True)
    records = [json.dumps({"text": f"{number} times 3 is {number * 3}. " * 20}) for number in range(400)]
    (text / "train" / "a.jsonl").write_text("\n".join(records))
    command = ["bash", str(ROOT / "benchmarks" / "slice.sh"), "s1", "--miniature", "--out", str(tmp_path / "out")]
    command += ["--text", str(text)]
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([*command, "--jobs", "2", "--minutes", "20"], env=environment, check=True)
    record = json.loads((tmp_path / "out" / "slice.json").read_text())
    log = (tmp_path / "out" / "log.txt").read_text().splitlines()
    messages = [line for line in log if not line.endswith(("left", "it/s]"))]  # all but progress
    assert record["complete"] and len(record["runs"]) == 2 * (15 + 1), "\n".join(messages)
    assert {"slice-s1.tgz", "slice-s1-untrained.tgz", "log.txt"} < {path.name for path in (tmp_path / "out").iterdir()}
