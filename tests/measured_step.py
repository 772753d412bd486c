"""Train students and print the memory that each took at its peak, beyond what was there before, as JSON.

`python measured_step.py RECIPE:STUDENT ...`. The real pipeline and trainer run, in one process one after another, with
what the recipe needs made before; nothing is estimated here. The first is trained once more before it is measured: what
a process loads for its first training (libraries, compiled kernels) is no part of any.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path


class _Measured(Exception):
    """Ends a training after its first evaluation."""


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS, resident now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def peak_of(recipe_file: str, student: str) -> int:
    """Bytes at the peak, above those before teacher and student are made."""
    from cocomix.pipeline import student_inputs
    from cocomix.pipeline.artifacts import Pipeline
    from cocomix.pipeline.recipe_file import load_recipe
    from cocomix.pipeline.run import run_stage, run_stages
    from cocomix.training.trainer import ObjectiveTrainer

    recipe = load_recipe(recipe_file)
    pipeline = Pipeline(recipe)
    stage = pipeline.student_stages[student, recipe.seed]
    before: list[int] = []
    open_inputs, save = student_inputs.student_inputs, ObjectiveTrainer._save_checkpoint

    def begin(*arguments):
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before.append(_status("VmRSS"))
        ObjectiveTrainer._save_checkpoint = stop  # follows the first evaluation; a checkpoint is no part of a step
        return open_inputs(*arguments)

    def stop(*_):
        raise _Measured

    student_inputs.student_inputs = begin
    try:
        run_stages(pipeline, stage.with_needs()[:-1])  # which leaves no teacher in memory
        run_stage(pipeline, stage)
    except _Measured:
        return _status("VmHWM") - before[0]
    finally:
        student_inputs.student_inputs, ObjectiveTrainer._save_checkpoint = open_inputs, save
    raise AssertionError("the training was not evaluated")


if __name__ == "__main__":
    peak_of(*sys.argv[1].split(":"))
    sys.stdout.write(json.dumps({one: peak_of(*one.split(":")) for one in sys.argv[1:]}))
