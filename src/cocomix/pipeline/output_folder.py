"""Checks of the output folder: a recipe must not write over, into or around the user's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cocomix.common import files
from cocomix.common.errors import InputError
from cocomix.data.sources import PYTHON_STDLIB
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.stage import Stage


def check_output(pipeline: Pipeline, wanted: Sequence[Stage]) -> None:
    """Raise InputError if the missing stages of `wanted` must not be written to the output folder.

    Refused are: a folder that is not writable; a folder inside the text of the corpus; the home, root or current folder
    or a parent of it, unless it already is an output folder; and a stage whose folder holds something that the recipe
    reads.
    """
    missing = [stage for stage in wanted if not stage.is_done()]
    if not missing:
        return
    folder, read = pipeline.folder.resolve(), _local_sources(pipeline.recipe)
    files.check_creatable(pipeline.folder)
    if pipeline.corpus_stage in missing or pipeline.recipe.corpus.streaming is not None:
        for name in read:
            if name.startswith("corpus.") and folder.is_relative_to(read[name]):
                raise InputError(f"output is {folder}, which lies inside {name} {read[name]}; choose another folder")
    begun = any(stage.is_done() or stage.is_begun() for stage in pipeline.stages())
    if folder in _crowded() and not begun and any(folder.iterdir()):
        raise InputError(f"output is {folder}, which holds other files; give this recipe a separate folder")
    for stage in missing:
        for name, source in read.items():
            if any(source.is_relative_to(made.resolve()) for made in (stage.folder, files.partial(stage.folder))):
                raise InputError(
                    f"{name} {source} lies where {stage.name} would be written; choose another output folder"
                )


def _local_sources(recipe: Recipe) -> dict[str, Path]:
    """Return the local paths that the recipe reads, by key."""
    texts = {f"corpus.sources[{number}]": each.source for number, each in enumerate(recipe.corpus.sources or ())}
    given = {
        **(texts or {"corpus.source": recipe.corpus.source}),
        "corpus.validation_source": recipe.corpus.validation_source,
        "tokenizer.source": recipe.tokenizer.source,
        "teacher.source": recipe.teacher.source,
        "sae.source": recipe.sae.source,
        "labels.source": recipe.labels.source,
    }
    return {
        name: Path(source).resolve()
        for name, source in given.items()
        if source not in (None, PYTHON_STDLIB) and Path(source).exists()
    }


def _crowded() -> set[Path]:
    """Return the folders that usually hold unrelated files."""
    here = Path.cwd()
    return {here, *here.parents, Path("~").expanduser().resolve()}
