"""Every benchmark runs, at a size that says nothing about speed, and writes its figures."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("command", "rows"),
    [
        ("train_step.py --shape tiny --no-memory", 7),
        ("train_step.py --shape tiny --no-memory --methods plain cocomix --precision fp32 bf16", 4),
        ("extract.py --shape tiny", 6),
        ("generate.py --shape tiny --batch 1 2 --prompt 8 --new-tokens 4 --no-memory", 6),
        ("data.py --documents 60 --block-size 32", 3),
        ("scaling.py --shape tiny --axes active_concepts --values 4 8 --no-memory", 2),
    ],
)
def test_a_benchmark_measures_and_writes(
    command: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, *options = command.split()
    figures = tmp_path / "figures.json"
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("sys.argv", [script, *options, "--repeats", "1", "--json", str(figures)])
    monkeypatch.setattr("measuring.MATMUL_SIZE", {"cpu": 64})
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    written = json.loads(figures.read_text())
    assert len(written["rows"]) == rows
    assert {"command", "commit", "hardware", "date"} <= written.keys()
    measured = [row for row in written["rows"] if row.get("part") != "token head, loss and backward"]  # a difference
    numbers = [value for row in measured for value in row.values() if isinstance(value, float)]
    assert numbers and all(value > 0 for value in numbers if value == value)
