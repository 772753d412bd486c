"""Write a request of the page as a command and as Python."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from cocomix.app.steering_controls import steering_of
from cocomix.inspection.generation import GenerationSettings
from cocomix.inspection.notation import write_operation
from cocomix.models.steering import ALL, Operation

PYTHON = """\
import cocomix  # registers the model
from cocomix import Steering
from transformers import AutoModelForCausalLM, AutoTokenizer

run = {run!r}
model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
inputs = tokenizer({prompt!r}, return_tensors="pt", add_special_tokens=False)
steering = {steering}
ids = model.generate(**inputs, steering=steering, {options})
print(tokenizer.decode(ids[0]))
"""


def as_command(
    run: Path, prompt: str, settings: GenerationSettings, operations: Sequence[Operation], positions: str
) -> str:
    """Return the command that generates the steered text of a request."""
    options = ["--max-new-tokens", str(settings.max_new_tokens)]
    if settings.temperature:
        options += ["--temperature", f"{settings.temperature:g}", "--top-p", f"{settings.top_p:g}"]
        options += ["--seed", str(settings.seed)]
    for operation in operations:
        options += ["--steer", write_operation(operation)]
    if operations:
        options += [*(["--positions", positions] if positions != ALL else []), "--compare"]
    return shlex.join(["cocomix", "generate", str(run), *options, *(["--"] if prompt.startswith("-") else []), prompt])


def as_python(
    run: Path, prompt: str, settings: GenerationSettings, operations: Sequence[Operation], positions: str
) -> str:
    """Return a Python program that generates the steered text of a request."""
    options = [f"max_new_tokens={settings.max_new_tokens}", f"do_sample={settings.temperature > 0}"]
    if settings.temperature:
        options += [f"temperature={settings.temperature:g}", f"top_p={settings.top_p:g}", "top_k=0"]
    steering = steering_of(operations, positions)
    return PYTHON.format(run=str(run), prompt=prompt, steering=steering, options=", ".join(options))
