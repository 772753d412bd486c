"""`cocomix export RUN`: write a trained model, or the results of runs, in a form that travels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cocomix.cli.options import argument, option
from cocomix.common import files
from cocomix.common.console import show
from cocomix.common.errors import InputError


def export(
    source: Annotated[Path, argument("RUN", "Folder of a trained model; for a bundle, also an output folder.")],
    target: Annotated[Path | None, argument("TARGET", "What to write (default: named after RUN, here).")] = None,
    to: Annotated[
        Literal["model", "bundle"], typer.Option(help="A folder with the model, or a file with results only.")
    ] = "model",
    dtype: Annotated[Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="Dtype of the weights.")] = None,
    max_shard_size: Annotated[str | None, option("SIZE", "Limit on the size of a weights file: 15MB.")] = None,
) -> None:
    """Export a trained model, or results without weights.

    A bundle holds the records of finished runs: settings, learning curves, measurements, losses per document. `cocomix
    compare` reads bundles in place of folders, also from several machines.
    """
    if to == "bundle":
        without_effect = [
            name for name, value in (("--dtype", dtype), ("--max-shard-size", max_shard_size)) if value is not None
        ]
        if without_effect:
            raise InputError(
                f"{', '.join(without_effect)} has no effect on a bundle, which has no weights; leave it out"
            )

        from cocomix.reporting.bundles import write_bundle

        target = files.located(target or f"{source.resolve().name}.tar.gz")
        runs = write_bundle(source, target)
        show(f"{target}: {runs} {'run' if runs == 1 else 'runs'}, {target.stat().st_size / 1e6:.2f} MB")
        return

    from cocomix.models.exporting import export_model

    target = files.located(target or f"{source.resolve().name}-{dtype or 'exported'}")
    for path in export_model(source, target, dtype, max_shard_size):
        show(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
