"""The concept catalogue through the command line."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk

from cocomix.cli import recipe as recipe_commands
from cocomix.cli.main import main
from tiny_run import Runner, finished_run, tiny_recipe


def test_the_catalogue_counts_what_the_labels_say(catalogued: Path) -> None:
    rows = pq.read_table(catalogued / "catalog" / "catalog.parquet").to_pydict()
    ids = load_from_disk(str(catalogued / "labels"))["train"].with_format("numpy")["concept_ids"][:]
    assert rows["concept_id"] == list(range(64))
    assert rows["label_count"] == np.bincount(ids[ids >= 0], minlength=64).tolist()
    assert sum(rows["frequency"]) == pytest.approx(8, rel=0.05)  # k latents are active at nearly every token
    assert max(map(len, rows["contexts"])) == 3
    assert rows["contexts"][int(np.argmax(rows["frequency"]))][0]["source"].endswith(".txt")


def test_it_is_made_once(finished: Runner, catalogued: Path, capsys) -> None:
    options = ("--output", str(catalogued), "--catalog.contexts", "3")
    assert finished("concepts", *options) == 0
    assert "Nothing to do" in capsys.readouterr().err
    assert finished("concepts", "--output", str(catalogued)) == 2
    assert "catalog.contexts is 3 there, 10 here" in capsys.readouterr().err


def test_a_run_knows_the_recipe_of_its_catalogue(catalogued: Path, capsys) -> None:
    run = catalogued / "students" / "cocomix"
    for each in (run, catalogued):
        assert main(["concepts", str(each), "--catalog.contexts", "3"]) == 0
        printed = capsys.readouterr().err
        assert "Nothing to do" in printed
    proposed = shlex.split(printed.rpartition("Next: ")[2])
    assert proposed[1:3] == ["concepts", "search"] and main(proposed[1:]) == 0
    (catalogued / "labels").rename(catalogued / "elsewhere")
    assert main(["concepts", str(run)]) == 2
    assert "which are gone; give its recipe file" in capsys.readouterr().err
    (catalogued / "elsewhere").rename(catalogued / "labels")


def test_the_quickstart_has_a_catalogue(text: Path, tmp_path_factory, monkeypatch, capsys) -> None:
    runner = finished_run(tmp_path_factory, "finished", lambda output: tiny_recipe(text, output))
    monkeypatch.setattr(recipe_commands, "quickstart_recipe", lambda: runner.recipe)
    assert main(["quickstart", "--catalog.max_blocks", "20"]) == 0
    assert (runner.folder / "out" / "catalog" / "catalog.parquet").is_file()
    assert "catalog\n" in capsys.readouterr().err
    assert main(["quickstart"]) == 0  # a catalog with other settings stays
    assert "Nothing to do" in capsys.readouterr().err


def test_search_and_show(catalogued: Path, capsys) -> None:
    catalog = catalogued / "catalog"
    for run in (catalog, catalogued, catalogued / "students" / "cocomix", catalogued.parent):
        assert main(["concepts", "search", str(run), "river", "--limit", "3", "--json"]) == 0
        captured = capsys.readouterr()
        assert captured.err == f"Catalog: {catalog}\n"
        hits = json.loads(captured.out)
        assert 1 <= len(hits) <= 3
    concept = hits[0]["concept_id"]
    assert main(["concepts", "show", str(catalogued), str(concept)]) == 0
    assert f"concept {concept}" in capsys.readouterr().out
    assert main(["concepts", "search", "river", "--catalog", str(catalog)]) == 0  # the former spelling
    assert str(concept) in capsys.readouterr().out


def test_names_from_a_file(catalogued: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "catalog"
    shutil.copytree(catalogued / "catalog", folder)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"5": "gardens of stone"}))
    assert main(["concepts", "name", "--names", str(names), "--catalog", str(folder)]) == 0
    assert "1 concept named from names.json; 63 unchanged" in capsys.readouterr().err
    assert main(["concepts", "search", "gardens of stone", "--catalog", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["concept_id"] == 5
    names.write_text(json.dumps({"64": "beyond"}))
    assert main(["concepts", "name", "--names", str(names), "--catalog", str(folder)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2  # the first one names the catalog


def test_without_a_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["concepts", "search", "river"]) == 2
    assert "there is none in runs; give RUN" in capsys.readouterr().err
    assert main(["concepts", "show", "1", "--catalog", "nowhere"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("cocomix: which concept catalog? there is none in nowhere")


def test_the_only_catalogue_is_found(catalogued: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    shutil.copytree(catalogued / "catalog", tmp_path / "runs" / "tiny" / "catalog")
    monkeypatch.chdir(tmp_path)
    assert main(["concepts", "show", "1"]) == 0
    shutil.copytree(catalogued / "catalog", tmp_path / "runs" / "other" / "catalog")
    assert main(["concepts", "show", "1"]) == 2
    assert "runs has 2 (" in capsys.readouterr().err


def test_a_recipe_without_concepts_has_no_catalogue(recipe, capsys) -> None:
    runner = recipe(students={"ntp": {"method": "ntp"}})
    assert runner("concepts") == 2
    assert "this recipe has no stage 'catalog'" in capsys.readouterr().err


def test_labels_made_elsewhere_need_their_teacher_and_sae(finished: Runner, recipe, tmp_path: Path, capsys) -> None:
    out = finished.folder / "out"
    labels = {"source": str(out / "labels")}
    runner = recipe(labels=labels)
    assert runner("concepts") == 2
    assert "set teacher.source and sae.source" in capsys.readouterr().err
    given = {
        "teacher": {"source": str(out / "teacher")},
        "sae": {"source": str(out / "sae"), "teacher_layer": 1},
        "tokenizer": {"source": str(out / "corpus" / "tokenizer")},
    }
    runner = recipe(labels=labels, **given)
    assert runner("concepts") == 0
    assert (tmp_path / "out" / "catalog" / "catalog.parquet").is_file()


def test_a_teacher_with_another_tokenizer_has_its_own_contexts(finished: Runner, recipe, tmp_path: Path) -> None:
    out = finished.folder / "out"
    runner = recipe(
        teacher={"source": str(out / "teacher")},
        sae={"source": str(out / "sae"), "teacher_layer": 1},
        corpus={"max_documents": 60},
        tokenizer={"vocab_size": 258},
        labels={"alignment": "characters", "online": False},
    )
    assert runner("concepts") == 0
    rows = pq.read_table(tmp_path / "out" / "catalog" / "catalog.parquet").to_pydict()
    assert sum(rows["label_count"]) > 0
    strongest = rows["contexts"][int(np.argmax(rows["max_activation"]))][0]
    assert strongest["source"].endswith(".txt")
