"""`cocomix export RUN`: write a trained model, or the results of runs, in a form that travels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cocomix.cli.options import RUN, argument, option
from cocomix.common import files
from cocomix.common.console import show
from cocomix.common.errors import InputError

Form = Literal["model", "transformers", "gguf", "bundle"]
OPTIONS: dict[Form, tuple[str, ...]] = {
    "model": ("--dtype", "--max-shard-size"),
    "transformers": ("--dtype", "--max-shard-size"),
    "gguf": ("--dtype", "--converter"),
    "bundle": (),
}
"""The options that have an effect on each form."""


def export(
    source: Annotated[Path, argument("RUN", f"{RUN} A bundle holds all of its students.")],
    target: Annotated[Path | None, argument("TARGET", "What to write (default: named after RUN, here).")] = None,
    to: Annotated[
        Form,
        typer.Option(
            help="The model itself; its plain decoder for stock Transformers or llama.cpp; or a file with results only."
        ),
    ] = "model",
    dtype: Annotated[Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="Dtype of the weights.")] = None,
    max_shard_size: Annotated[str | None, option("SIZE", "Limit on the size of a weights file: 15MB.")] = None,
    converter: Annotated[Path | None, option("FILE", "llama.cpp's convert_hf_to_gguf.py, for gguf.")] = None,
) -> None:
    """Export a trained model, or results without weights.

    `transformers` and `gguf` write a plain decoder (GPT-2, Llama, …), which students without mixing have: ntp, kd, and
    cocomix with mixing none. A bundle holds the records of finished runs: settings, learning curves, measurements,
    losses per document. `cocomix compare` reads bundles in place of folders, also from several machines.
    """
    _check_options(to, {"--dtype": dtype, "--max-shard-size": max_shard_size, "--converter": converter})
    if to != "bundle":
        from cocomix.inspection.runs import model_folder

        source = model_folder(source)
    name = f"{source.resolve().name}{'' if dtype is None else f'-{dtype}'}"
    if to == "bundle":
        from cocomix.reporting.bundles import write_bundle

        target = files.located(target or f"{name}.tar.gz")
        runs = write_bundle(source, target)
        show(f"{target}: {runs} {'run' if runs == 1 else 'runs'}, {_megabytes(target)}")
    elif to == "gguf":
        from cocomix.models.gguf import export_gguf

        target = files.located(target or f"{name}.gguf")
        export_gguf(source, target, dtype, converter)
        show(f"{target}: {_megabytes(target)}")
    else:
        from cocomix.models.exporting import export_model
        from cocomix.pipeline.model_card import write_card
        from cocomix.training.run import RUN_FILE

        plain = to == "transformers"
        target = files.located(target or (f"{name}-plain" if plain else name if dtype else f"{name}-exported"))
        weights = export_model(source, target, dtype, max_shard_size, plain)
        if (source / RUN_FILE).is_file():
            write_card(target, source)
        for path in weights:
            show(f"{path}: {_megabytes(path)}")


def _check_options(to: Form, values: dict[str, object]) -> None:
    """Raise InputError for options without effect on this form."""
    if unused := [name for name, value in values.items() if value is not None and name not in OPTIONS[to]]:
        raise InputError(f"{', '.join(unused)} has no effect on --to {to}; leave it out")


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.2f} MB"
