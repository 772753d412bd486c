"""A recipe writes over, into and around nothing that belongs to the user."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cocomix.common import files
from cocomix.common.errors import InputError
from cocomix.data.corpus import CorpusConfig
from cocomix.pipeline import output_folder
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.methods import StudentConfig
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.stage import CLAIM_FILE, RECORD_FILE, StageResult


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in a home folder, three levels deep, with a corpus in it."""
    folder = tmp_path / "home" / "work" / "here"
    (folder / "texts").mkdir(parents=True)
    (folder / "texts" / "one.txt").write_text("years of work ")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


def pipeline(output: str, source: str = "texts") -> Pipeline:
    corpus = CorpusConfig(source=source, validation_fraction=0.1)
    return Pipeline(Recipe("test", output, corpus=corpus, students={"ntp": StudentConfig("ntp")}))


def refused(output: str, words: str, source: str = "texts") -> None:
    made = pipeline(output, source)
    with pytest.raises(InputError, match=re.escape(words)):
        output_folder.check_output(made, [made.corpus_stage])


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (".", "here, which holds other files"),
        ("new/..", "here, which holds other files"),
        ("..", "work, which holds other files"),
        ("~", "home, which holds other files"),
        ("link-to-home", "home, which holds other files"),
        ("/", "output is /, which holds other files"),
        ("texts", "texts, which lies inside corpus.source"),
        ("texts/new", "texts/new, which lies inside corpus.source"),
        ("link-to-texts/new", "texts/new, which lies inside corpus.source"),
        ("texts/one.txt", "one.txt is not a folder"),
        ("texts/one.txt/new", "one.txt is not a folder"),
    ],
)
def test_outputs_that_are_refused(here: Path, output: str, words: str) -> None:
    (here / "link-to-home").symlink_to(here.parents[1])
    (here / "link-to-texts").symlink_to("texts")
    refused(output, words)


@pytest.mark.parametrize("folder", ["corpus", "corpus.partial"])
def test_a_corpus_where_the_packed_one_is_to_be_made_is_kept(here: Path, folder: str) -> None:
    (here / "out").mkdir()
    (here / "texts").rename(here / "out" / folder)
    refused("out", f"out/{folder} lies where corpus would be written", source=f"out/{folder}")


def test_a_corpus_elsewhere_in_the_output_serves(here: Path) -> None:
    (here / "out").mkdir()
    (here / "texts").rename(here / "out" / "texts")
    made = pipeline("out", source="out/texts")
    output_folder.check_output(made, [made.corpus_stage])


def test_the_current_folder_serves_once_it_is_an_output(here: Path) -> None:
    made = pipeline(".", str(here.parent / "texts"))
    (here / "texts").rename(here.parent / "texts")
    output_folder.check_output(made, [made.corpus_stage])  # empty
    (here / "corpus.partial").mkdir()
    files.write_json(here / "corpus.partial" / CLAIM_FILE, {})
    output_folder.check_output(made, [made.corpus_stage])


def test_a_corpus_that_appears_after_the_check_is_kept(here: Path) -> None:
    made = pipeline("out")
    output_folder.check_output(made, [made.corpus_stage])
    (here / "out").mkdir()
    (here / "texts").rename(here / "out" / "corpus")
    with pytest.raises(InputError, match=r"out/corpus exists and was not created by cocomix"):
        made.corpus_stage.run(lambda folder: StageResult("fingerprint", {}))
    assert [path.name for path in (here / "out" / "corpus").iterdir()] == ["one.txt"]
    assert (here / "out" / "corpus.partial" / RECORD_FILE).exists()
