"""A random student, and the endpoint that serves it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cocomix.inspection.runs import OpenRun
from served import Served, serving
from small_catalog import CONCEPTS, catalog_of
from small_run import run_in_memory

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.content }} {% endfor %}w9"
)


@pytest.fixture(scope="session")
def run(random_model) -> OpenRun:
    """An interleaved student with a context of 64 tokens, the words w0 to w51 and the end w52."""
    torch.manual_seed(0)
    run = run_in_memory(random_model(num_concepts=CONCEPTS), catalog_of({3: "rivers", 4: "stones"}))
    run.tokenizer.chat_template = CHAT_TEMPLATE
    return run


@pytest.fixture(scope="module")
def served(run) -> Iterator[Served]:
    """The endpoint in a thread."""
    yield from serving(run)
