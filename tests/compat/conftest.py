"""Record which tools of the field were tried, with their versions and results, for the page of compatibility.

A test carries `@pytest.mark.compat(TOOL, TRIED)`, or with `refused=True` if it checks a refusal. The variable
COCOMIX_COMPAT names a file for the results.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import cocomix

Build = Callable[..., Path]
RESULTS: dict[tuple[str, str], str] = {}
"""Result by tool and what was tried."""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    marker = item.get_closest_marker("compat")
    if marker is None or (report.passed and report.when != "call"):
        return
    result = report.outcome
    if report.passed:
        result = "refused in one line" if marker.kwargs.get("refused") else "works"
    before = RESULTS.setdefault(marker.args, result)
    if not report.passed or before == result:
        RESULTS[marker.args] = result  # one failure of several models counts


def pytest_sessionfinish() -> None:
    if path := os.environ.get("COCOMIX_COMPAT"):
        rows = [
            {"tool": tool, "version": importlib.metadata.version(tool), "tried": tried, "result": result}
            for (tool, tried), result in sorted(RESULTS.items())
        ]
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """The words w0 to w51, and w52, the end."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(53)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w52", pad_token="w0")


@pytest.fixture
def student(random_model, tokenizer, tmp_path: Path) -> Callable[..., cocomix.CoCoMixForCausalLM]:
    """student("gpt2", mixing="add"): a small student in float32, with small weights so that it can be trained."""

    def build(kind: str = "llama", **settings: object) -> cocomix.CoCoMixForCausalLM:
        model = random_model(kind, concept_slot="residual", **settings).float()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.mul_(0.3)
        model.generation_config.pad_token_id = 0
        return model

    return build


@pytest.fixture
def folder(student, tokenizer, tmp_path: Path) -> Build:
    """folder(mixing="add"): the folder of a saved student with its tokenizer."""

    def build(**settings: object) -> Path:
        path = tmp_path / "student"
        student(**settings).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return build


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
