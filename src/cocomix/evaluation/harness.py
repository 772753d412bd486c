"""Evaluate a saved model on the tasks of EleutherAI's lm-evaluation-harness.

`lm_eval --model hf --model_args pretrained=RUN,trust_remote_code=True` gives the same figures to the last digit at the
same batch size. The only difference: `models.loading` loads the model here and refuses incomplete weights.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocomix.common import environment
from cocomix.common.console import status
from cocomix.common.errors import InputError, did_you_mean, error_message
from cocomix.common.settings import Batch, Count
from cocomix.evaluation.record import Evaluation
from cocomix.inspection.runs import OpenRun

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.result_schema import EvalResults
    from lm_eval.tasks import TaskManager

NOTES = ("`pretrained` model kwarg is not", "already-initialized model", "Custom kwargs can be passed")
"""Warnings of the harness about the way this module calls it; they do not apply."""


@dataclass(frozen=True)
class TaskSettings:
    """Settings for evaluating a model on tasks.

    Attributes:
        names: tasks, groups or tags of the harness; `*` matches any characters.
        definitions: folder of additional task definitions.
        limit: evaluate only the first `limit` items of each task; None means all.
        batch_size: requests per batch.
        precision: `fp32`, or `bf16` for matrix products.
    """

    names: list[str]
    definitions: Path | None = None
    limit: Count | None = None
    batch_size: Batch = 8
    precision: str = "fp32"


@dataclass(frozen=True)
class TaskPlan:
    """Tasks to evaluate, with their data loaded.

    Attributes:
        settings: the requested settings.
        tasks: tasks of the harness.
        manager: the task manager that loaded them.
    """

    settings: TaskSettings
    tasks: list[Task | Group]
    manager: TaskManager


def plan_tasks(settings: TaskSettings) -> TaskPlan:
    """Find the tasks and load their data.

    Raises:
        InputError: the harness is not installed, a task is unknown, or its data cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError("tasks need lm-evaluation-harness: pip install 'cocomix[eval]'") from None
    _show_warnings()
    definitions = settings.definitions
    if definitions is not None and not definitions.is_dir():
        raise InputError(f"--tasks-path is {definitions}, which is not a folder")
    # Try the given definitions alone first: reading those of all the harness' tasks takes many seconds.
    manager = TaskManager(include_path=definitions, include_defaults=definitions is None)
    if definitions is not None and not all(manager.match_tasks([name]) for name in settings.names):
        manager = TaskManager(include_path=definitions)
    for name in settings.names:
        if not manager.match_tasks([name]):
            hint = did_you_mean(name, manager.all_tasks)
            raise InputError(f"--tasks names {name!r}, an unknown task{hint}; list them with: lm-eval ls tasks")
    names = manager.match_tasks(settings.names)
    return TaskPlan(settings, [task for name in names for task in _load(manager, name)], manager)


def _show_warnings() -> None:
    """Show the harness' warnings; some affect the figures, such as truncated texts."""
    logger = logging.getLogger("lm_eval")
    logger.handlers, logger.propagate = [_Warnings(logging.WARNING)], False


class _Warnings(logging.Handler):
    """Prints only the first warning from each line of the harness' code; some are repeated for every item."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._seen: set[tuple[str, int]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message, place = " ".join(record.getMessage().split()), (record.pathname, record.lineno)
        if place not in self._seen and not any(note in message for note in NOTES):
            self._seen.add(place)
            status(f"lm-evaluation-harness (first of its kind): {message}")


def _load(manager: TaskManager, name: str) -> list[Task | Group]:
    """Load the task, the group, or the tasks of the tag with this name."""
    try:
        loaded = manager.load(name)
    except Exception as error:  # no network, a missing or damaged file, an invalid definition
        raise InputError(
            f"task {name!r} or its data cannot be loaded ({type(error).__name__}: {error_message(error)})"
        ) from error
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def evaluate_tasks(run: OpenRun, plan: TaskPlan) -> list[Evaluation]:
    """Evaluate a model on each task and group.

    Raises:
        InputError: the model does not load, or an answer cannot be scored because it is longer than the context or the
            tokenizer merges it into the question.
    """
    from lm_eval.models.huggingface import HFLM

    settings = plan.settings
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints its progress to stdout
        model = HFLM(
            pretrained=run.model,
            tokenizer=run.tokenizer,
            mixed_precision_dtype="bfloat16" if settings.precision == "bf16" else None,
            batch_size=settings.batch_size,
        )
        found = _evaluated(model, plan)
    described = environment.describe()
    return [
        Evaluation(
            kind="task",
            name=name,
            settings={
                "limit": settings.limit,
                "precision": settings.precision,
                "num_fewshot": found["n-shot"].get(name, 0),
                "version": found["versions"].get(name),
            },
            figures={"items": figures.get("sample_len"), "metrics": _metrics(figures)},
            environment=described,
        )
        for name, figures in found["results"].items()
    ]


def _evaluated(model: HFLM, plan: TaskPlan) -> EvalResults:
    """Run the harness."""
    from jinja2 import TemplateError
    from lm_eval import simple_evaluate

    try:
        return simple_evaluate(
            model=model, tasks=plan.tasks, limit=plan.settings.limit, log_samples=False, task_manager=plan.manager
        )
    except AssertionError as error:  # raised for an answer that the harness cannot score
        message = _unscored(model, plan.tasks) or f"lm-evaluation-harness stopped ({error or 'an assertion failed'})"
    except TemplateError as error:  # a definition names a column that the data lack
        message = f"a task's definition does not fit its data: {error_message(error)}"
    # Raise outside the handlers: the harness' progress bars close only when its exception is released.
    raise InputError(message)


def _unscored(model: HFLM, tasks: Iterable[Task | Group]) -> str | None:
    """Describe the first answer that the harness cannot score; None if it can score all of them.

    The harness defines an answer's tokens as those of question and answer together, after the question's tokens.
    """
    for task in tasks:
        if hasattr(task, "get_all_tasks"):
            if found := _unscored(model, task.get_all_tasks()):
                return found
            continue
        for request in task.instances:
            if request.request_type != "loglikelihood":
                continue
            question, answer = request.args
            asked = len(model.tok_encode(question.rstrip()))
            tokens = len(model.tok_encode(question + answer)) - asked
            what = f"the answer {answer!r:.60} of task {task.task_name}"
            if tokens < 1:
                return (
                    f"{what} has no separate token: this tokenizer merges it with the end of its question "
                    f"{question[-20:]!r}, so it cannot be scored; leave this task out, or use another tokenizer"
                )
            if tokens > model.max_length:
                return (
                    f"{what} has {tokens} tokens, more than the model's context of {model.max_length}; leave this "
                    "task out"
                )
    return None


def _metrics(figures: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Collect value and standard error of each metric; the harness' keys are `METRIC,FILTER` and
    `METRIC_stderr,FILTER`."""
    metrics = {}
    for key, value in figures.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            name = metric if filtered == "none" else key
            error = figures.get(f"{metric}_stderr,{filtered}")
            metrics[name] = {"value": _finite(value), "stderr": _finite(error)}
    return metrics


def _finite(value: object) -> float | None:
    """Return a finite number, or None; the harness uses "N/A" for missing values."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None
