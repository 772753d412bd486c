"""`evaluation.json`: measurements of a model add up, a repeated one takes the place of the old."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from cocomix.common.document import plain_text
from cocomix.common.errors import InputError
from cocomix.evaluation.record import EVALUATION_FILE, Evaluation, add_evaluations, load_evaluations
from cocomix.reporting.tables import evaluation_tables


def text(name: str = "val", loss: float = 3.0, **settings: object) -> Evaluation:
    figures = {
        "documents": 2,
        "tokens": 1200,
        "loss": loss,
        "perplexity": 20.0,
        "perplexity_interval": [19.0, 21.5],
        "bits_per_byte": 1.25,
        "bits_per_byte_interval": None,
        "by_context": [{"from": 1, "to": 1, "tokens": 2, "loss": 5.5}],
        "by_frequency": [{"from": 10000, "to": None, "tokens": 2, "loss": 2.5}],
    }
    chosen = {"text": "abcdefgh", "window": 64, "stride": 32, "precision": "fp32", **settings}
    return Evaluation("text", name, chosen, figures, {"date": "2026-11-24"})


def task(name: str, limit: int | None = None) -> Evaluation:
    metrics = {"acc": {"value": 0.625, "stderr": 0.125}, "word_perplexity": {"value": 1.5e7, "stderr": None}}
    settings = {"limit": limit, "precision": "fp32", "num_fewshot": 0, "version": 1.0}
    return Evaluation("task", name, settings, {"items": 8, "metrics": metrics}, {})


def test_measurements_are_merged(tmp_path: Path) -> None:
    assert load_evaluations(tmp_path) == []
    add_evaluations(tmp_path, [text(), task("piqa")])
    add_evaluations(tmp_path, [text(loss=2.0), text(precision="bf16"), task("piqa", limit=8)])
    found = load_evaluations(tmp_path)
    assert found == [task("piqa"), text(loss=2.0), text(precision="bf16"), task("piqa", limit=8)]
    assert [path.name for path in tmp_path.iterdir()] == [EVALUATION_FILE]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"evaluations": [{"kind": "text"}]}'])
def test_a_file_that_holds_something_else_is_kept_and_named(tmp_path: Path, content: str) -> None:
    (tmp_path / EVALUATION_FILE).write_text(content)
    with pytest.raises(InputError, match="does not hold evaluations"):
        add_evaluations(tmp_path, [text()])
    assert (tmp_path / EVALUATION_FILE).read_text() == content


def test_tables() -> None:
    found = {
        "ntp": [asdict(text()), asdict(task("piqa")), asdict(task("piqa", limit=8))],
        "cocomix": [asdict(text(text="other123")), asdict(task("piqa"))],
        "pause": [],
    }
    texts, contexts, frequencies, tasks = (plain_text(table).splitlines() for table in evaluation_tables(found))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in texts]
    expected = ["ntp", "val #abcdef", "64/32 fp32", "2", "1,200", "3.0000", "20.00 (19.00–21.50)", "1.2500"]
    assert cells[2] == expected  # another text of the same name is not the same text
    assert cells[3][:2] == ["cocomix", "val #other1"]
    assert "5.5000" in contexts[2]
    assert "10,000+" in frequencies[0]
    assert [cell.strip() for cell in tasks[0].strip("|").split("|")] == ["task", "ntp", "cocomix"]
    assert [line.split("|")[1].strip() for line in tasks[2:]] == [
        "piqa acc",
        "piqa word_perplexity",
        "piqa acc (first 8)",
        "piqa word_perplexity (first 8)",
    ]
    assert "0.6250 ± 0.1250" in tasks[2]
    assert "1.5e+07" in tasks[3]
    assert tasks[4].split("|")[3].strip() == "–"
    assert evaluation_tables({"pause": []}) == []
