"""`cocomix inspect` and `cocomix generate` on a run, as a person uses them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import cocomix
from cocomix.catalog.search import open_catalog
from cocomix.cli.main import main
from cocomix.common.integrity import SUMS_FILE
from tiny_run import rewrite

TEXT = "The river crosses the stone."


@pytest.fixture
def run(catalogued: Path) -> tuple[str, str]:
    return ("--run", str(catalogued / "students" / "cocomix"))


def test_an_output_folder_stands_for_its_first_cocomix_student(run, catalogued, capsys):
    found = output(capsys, "generate", "The river", "--max-new-tokens", "8", *run)
    for folder in (catalogued, catalogued / "students" / "cocomix"):
        assert output(capsys, "generate", str(folder), "The river", "--max-new-tokens", "8") == found
    assert f"{catalogued} is a folder, so it is RUN; give PROMPT too" in refused(capsys, "generate", str(catalogued))


def output(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    """The one line that a mistake gets, after the model that was chosen."""
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("Model: ")]
    assert len(lines) == 1
    return lines[0]


# Inspect


def test_inspect_prints_tokens_concepts_and_names(run, catalogued, capsys):
    text = output(capsys, "inspect", TEXT, *run, "--concepts", "2")
    names = open_catalog(catalogued / "catalog").names
    first = re.search(r"^ +(\d+) .*%.* ([+-]\d\.\d{3}) +([+-]\d\.\d{3})  (.*)$", text, re.MULTILINE)
    assert names[int(first[1])].startswith(first[4].strip()[:3])
    assert "«The» → " in text and "(the model's choice)" in text
    assert "8 of 64 concepts mixed in at each" in text and "Gradient against ablation" in text
    assert "\033" not in text


def test_inspect_as_json_and_as_a_page(run, tmp_path, capsys):
    page = tmp_path / "trace.html"
    found = json.loads(output(capsys, "inspect", TEXT, *run, "--json", "--html", str(page), "--concepts", "all"))
    assert found["text"] == TEXT and "".join(token["text"] for token in found["tokens"]) == TEXT
    assert found["verified"] < 1e-5
    for token in found["tokens"]:
        shares = [concept["share"] for concept in token["concepts"]]
        assert len(shares) == 8 and sum(shares) + token["bias_share"] == pytest.approx(1, abs=1e-4)
        assert all(concept["ablation_effect"] is not None for concept in token["concepts"])
    content = page.read_text(encoding="utf-8")
    assert content.count("<section") == content.count('<a href="#t') == len(found["tokens"])
    assert "viewport" in content and "prefers-color-scheme: dark" in content
    assert not re.findall(r'(?:src|href)="(?!#)', content)  # nothing from elsewhere


def test_a_page_shows_text_as_text(run, tmp_path, capsys):
    page = tmp_path / "trace.html"
    assert output(capsys, "inspect", "<b>&", *run, "--html", str(page)) == ""
    content = page.read_text(encoding="utf-8")
    assert "<b>" not in content and "&amp;" in content


def test_a_terminal_gets_colour_unless_it_is_not_wanted(run, monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\033[1m«The»\033[0m" in output(capsys, "inspect", TEXT, *run)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in output(capsys, "inspect", TEXT, *run)


def test_a_steered_model_is_inspected(run, capsys):
    found = json.loads(output(capsys, "inspect", TEXT, *run, "--steer", "5==30", "--positions", "1-", "--json"))
    first, *rest = found["tokens"]
    assert first["concepts"][0]["logit"] != 30
    assert {(token["concepts"][0]["concept_id"], token["concepts"][0]["logit"]) for token in rest} == {(5, 30.0)}


# Generate


def test_generate_prints_the_prompt_and_what_follows(run, capsys):
    text = output(capsys, "generate", "The river", *run, "--max-new-tokens", "8")
    assert text.startswith("The river") and len(text) > len("The river\n")
    assert text == output(capsys, "generate", "The river", *run, "--max-new-tokens", "8", "--steer", "5=+0")
    cold = ("--max-new-tokens", "8", "--temperature", "1.5", "--seed")
    once, again, other = (output(capsys, "generate", "The river", *run, *cold, seed) for seed in "334")
    assert once == again != other


def test_generate_compares(run, capsys, monkeypatch):
    arguments = ("generate", "The river", *run, "--max-new-tokens", "10", "--steer", "5==500", "--compare")
    found = json.loads(output(capsys, *arguments, "--json"))
    assert found["plain"] != found["steered"]
    assert found["steering"] == ["5==500"] and found["max_new_tokens"] == 10
    plain, steered = (found["next_tokens"][side] for side in ("plain", "steered"))
    assert plain != steered and len(plain) == len(steered) == 5
    assert found["plain"][0].startswith(plain[0]["token"].rstrip("\ufffd"))  # greedy decoding
    monkeypatch.setenv("COLUMNS", "100")
    head = output(capsys, *arguments).splitlines()[0]
    assert re.fullmatch(r"plain +│ steered: 5==500", head)
    assert re.search(
        r"\nnext token, plain +│ next token, steered: 5==500\n +\d+\.\d% «.*│ +\d", output(capsys, *arguments)
    )
    monkeypatch.setenv("COLUMNS", "50")
    narrow = output(capsys, *arguments)
    assert narrow.startswith("plain\nThe river") and "\nsteered: 5==500\nThe river" in narrow


@pytest.mark.parametrize(
    ("options", "texts"),
    [(("--num-beams", "3"), 1), (("--temperature", "0.9", "--top-p", "0.8", "--num-samples", "3"), 3)],
    ids=["beams", "samples"],
)
def test_generate_with_beams_and_samples(options, texts, run, capsys):
    arguments = ("--max-new-tokens", "6", "--steer", "3=x5", "--positions", "generated", "--after-choice", "--json")
    found = json.loads(output(capsys, "generate", "The river", *run, *options, *arguments))
    assert len(found["steered"]) == texts


def test_names_are_looked_up(run, catalogued, tmp_path, capsys):
    folder, names = tmp_path / "catalog", tmp_path / "names.json"
    shutil.copytree(catalogued / "catalog", folder)
    names.write_text(json.dumps({"5": "gardens of stone"}))
    assert main(["concepts", "name", "--names", str(names), "--catalog", str(folder)]) == 0
    arguments = ("generate", "The river", *run, "--catalog", str(folder), "--max-new-tokens", "8", "--json", "--steer")
    by_name = json.loads(output(capsys, *arguments, "name:Gardens of Stone==500"))
    assert by_name["steered"] == json.loads(output(capsys, *arguments, "5==500"))["steered"]
    assert "no concept fits the name 'zebra'" in refused(capsys, *arguments, "name:zebra=off")


# Which model


def test_the_quickstarts_student_is_the_default(catalogued, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no model in runs/quickstart: it has no config.json; give the output" in refused(capsys, "inspect", TEXT)
    shutil.copytree(catalogued / "students", tmp_path / "runs" / "quickstart" / "students")
    assert main(["inspect", TEXT, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("Model: runs/quickstart/students/cocomix\n")  # not ntp, which is first
    found = json.loads(captured.out)
    assert found["run"] == "runs/quickstart/students/cocomix"
    assert found["tokens"][0]["concepts"][0]["name"] is None  # there is no catalogue
    assert "there is none; create it with `cocomix concepts runs/quickstart/students/cocomix`" in refused(
        capsys, "generate", TEXT, "--steer", "name:river=+4"
    )


def test_other_catalogues_and_models_are_refused(run, catalogued, tmp_path, capsys):
    assert "it has no config.json; give the output folder" in refused(capsys, "inspect", TEXT, "--run", str(tmp_path))
    plain = str(catalogued / "students" / "ntp")
    assert "mixes no concepts in; give a run of method cocomix" in refused(capsys, "inspect", TEXT, "--run", plain)
    student = tmp_path / "damaged"
    shutil.copytree(catalogued / "students" / "cocomix", student)
    (student / "model.safetensors").write_bytes(b"cut off")
    assert "model.safetensors is damaged" in refused(capsys, "inspect", TEXT, "--run", str(student))
    model = cocomix.CoCoMixForCausalLM.from_pretrained(run[1])
    config = model.config
    config.num_concepts = 65
    shutil.copytree(catalogued / "students" / "cocomix", tmp_path / "other")
    cocomix.CoCoMixForCausalLM(config).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / SUMS_FILE).unlink()
    line = refused(capsys, "inspect", TEXT, "--run", str(tmp_path / "other"), "--catalog", str(catalogued / "catalog"))
    assert "has 64 concepts and the model in" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", ""), "the text has 0 tokens"),
        (("inspect", "river " * 100), "tokens; this model reads 1 to"),
        (("inspect", TEXT, "--concepts", "few"), "--concepts is 'few'; expected a whole number"),
        (("inspect", TEXT, "--html", "nowhere/page.html"), "there is no folder nowhere"),
        (("inspect", TEXT, "--positions", "generated"), "a text that is only read has none"),
        (("inspect", TEXT, "--steer", "5=4"), "cannot read --steer '5=4'"),
        (("inspect", TEXT, "--steer", "64=+4"), "no concept 64 to steer: this model has 0 to 63"),
        (("generate", TEXT, "--steer", "5=+nan"), "to be steered by nan"),
        (("generate", TEXT, "--steer", "5=+4", "--positions", "x"), "cannot read positions 'x'"),
        (("generate", TEXT, "--after-choice"), "have no effect without --steer"),
        (("generate", TEXT, "--compare"), "--compare without --steer"),
        (("generate", TEXT, "--max-new-tokens", "0"), "--max-new-tokens is 0"),
        (("generate", TEXT, "--max-new-tokens", "999"), "this model's context of"),
        (("generate", TEXT, "--temperature", "-1"), "--temperature is -1; expected a number from 0"),
        (("generate", TEXT, "--temperature", "nan"), "temperature is 'nan'"),
        (("generate", TEXT, "--temperature", "1", "--top-p", "0"), "--top-p is 0; expected a number above 0"),
        (("generate", TEXT, "--top-p", "0.5"), "top_p is 0.5 without sampling"),
        (("generate", TEXT, "--num-samples", "2"), "2 samples would be the same at temperature 0"),
        (("generate", TEXT, "--seed", "-1"), "--seed is -1"),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(arguments, message, run, capsys):
    assert message in refused(capsys, *arguments, *run)


def test_a_catalogue_of_another_sae_is_refused(catalogued: Path, tmp_path: Path, capsys) -> None:
    """As many concepts, but others: their names would be wrong."""
    other = tmp_path / "catalog"
    shutil.copytree(catalogued / "catalog", other)
    rewrite(other / "catalog.json", sae="another")
    run = str(catalogued / "students" / "cocomix")
    assert main(["inspect", "river", "--run", run, "--catalog", str(other)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "is of another SAE than the one" in line


def test_what_a_name_came_to_is_said_and_kept(catalogued: Path, capsys) -> None:
    run = catalogued / "students" / "cocomix"
    names = list(open_catalog(catalogued / "catalog").names.values())
    name = next(name for name in names if names.count(name) == 1 and "=" not in name)
    wish = f"name:{name}=+4"
    options = ("--run", str(run), "--steer", wish, "--positions", "2-", "--max-new-tokens", "4", "--json")
    assert main(["generate", "The river", *options]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    (operation,) = found["operations"]
    assert found["steering"] == [wish]
    assert (operation["kind"], operation["value"]) == ("add", 4.0)
    assert (found["positions"], found["after_choice"]) == ("2-", False)
    assert captured.err.strip().splitlines()[-1] == f"Steered: {operation['concept']} ({name})"
