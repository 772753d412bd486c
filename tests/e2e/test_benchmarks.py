"""Every benchmark runs, at a size that says nothing about speed, and writes its figures."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("command", "rows"),
    [
        ("train_step.py --shape tiny --no-memory", 10),
        ("train_step.py --shape tiny --no-memory --methods plain cocomix --precision fp32 bf16", 4),
        ("extract.py --shape tiny", 6),
        ("sae_training.py --shape tiny", 1),
        ("generate.py --shape tiny --batch 1 2 --prompt 8 --new-tokens 4 --no-memory --static", 12),
        ("data.py --documents 60 --block-size 32", 3),
        ("serve.py --shape tiny --clients 1 2 --requests 1 --prompt 4 --new-tokens 4 --only steered", 2),
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
    with torch._dynamo.config.patch(disable=True):  # compilation is tested where it can go wrong
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    written = json.loads(figures.read_text())
    assert len(written["rows"]) == rows
    assert {"command", "commit", "hardware", "date"} <= written.keys()
    measured = [row for row in written["rows"] if row.get("part") != "token head, loss and backward"]  # a difference
    numbers = [value for row in measured for value in row.values() if isinstance(value, float)]
    assert numbers and all(value > 0 for value in numbers if value == value)


def test_the_gpu_run_measures_a_row_and_writes_it(tmp_path: Path) -> None:
    figures = tmp_path / "gpu.json"
    options = ["--miniature", "--only", "69m-gpu (plain|ntp)$", "--json", str(figures)]
    command = ["bash", str(BENCHMARKS / "gpu.sh"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(figures.read_text())
    assert {"command", "commit", "hardware", "date"} <= written.keys()
    plain, ntp = written["rows"]
    assert (plain["row"], plain["shape"], plain["times_plain"]) == ("plain", "69m-gpu", 1)
    assert ntp["times_plain"] == ntp["tokens_per_second"] / plain["tokens_per_second"]
    assert ntp["ms"] > 0 and ntp["peak_mb"] > 0


def test_a_failed_row_of_the_gpu_run_has_one_line_and_the_others_their_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    names = [(job.shape, name) for job in gpu.jobs() for name in job.rows]
    assert len(set(names)) == len(names)
    for shape in ("69m-gpu", "124m-gpu"):
        steps = {"plain", "ntp", "pause", "kd", "cocomix", "cocomix-add", "cocomix-none", "online"}
        generations = {f"generate interleave, batch {batch}, compiled" for batch in (1, 16)}
        assert steps | generations <= {name for each, name in names if each == shape}
    assert {"labels", "labels-activation", "SAE training"} <= {name for _, name in names}

    job = gpu.Job(
        "69m-gpu", ("x.py",), {"generate plain, batch 1": {"model": "plain"}, "generate add, batch 1": {"model": "add"}}
    )
    failed = gpu.rows_of(job, gpu.Outcome({}, "stopped after its 60 s", 60.0))
    assert [row["error"] for row in failed] == 2 * ["stopped after its 60 s"]
    figures = {"rows": [{"model": "plain", "tokens/s": 8.0}, {"model": "add", "tokens/s": 6.0, "peak MB": None}]}
    measured = gpu.rows_of(job, gpu.Outcome(figures, None, 1.0))
    gpu.add_ratios([*failed, *measured])
    assert [row["times_plain"] for row in measured] == [1.0, 0.75]
    assert not any("error" in row or "peak_mb" in row for row in measured)
