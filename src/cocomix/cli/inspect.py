"""`cocomix inspect [RUN] TEXT` and `cocomix generate [RUN] PROMPT`: look into a trained model, and steer it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocomix.cli.options import QUICKSTART, CatalogFolder, Json, Run, argument, given, option, read_number, setting
from cocomix.common import files
from cocomix.common.console import show, status
from cocomix.common.errors import InputError
from cocomix.common.settings import Batch, Concepts, Count, Seed

if TYPE_CHECKING:
    from cocomix.inspection.effects import NextToken
    from cocomix.inspection.runs import OpenRun
    from cocomix.models.steering import Steering

ALL = "all"
RunOption = Annotated[Path | None, typer.Option("--run", hidden=True, readable=False)]
"""The former spelling of the argument RUN."""
Steer = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SPEC",
        help="ID=+4 or ID=-4 adds, ID=x5 scales, ID==4 sets, ID=off suppresses; name:WORDS in place of ID looks it "
        "up; may be repeated.",
    ),
]
Positions = Annotated[str, option("WHERE", "Where to steer: all, generated, or a list such as 0,3,5-9,12-.")]
AfterChoice = Annotated[
    bool, typer.Option("--after-choice", help="Steer only concepts that are among the strongest anyway.")
]


@dataclass(frozen=True)
class SteeringOptions:
    """The options that steer.

    Attributes:
        steer: operations, each `ID=+4`, `name:WORDS=x5` or such.
        positions: where they apply.
        after_choice: they apply only to concepts that the model chooses anyway.
    """

    steer: list[str]
    positions: str
    after_choice: bool

    def read(self, opened: OpenRun) -> Steering:
        """Return what the options ask for of an opened run.

        Raises:
            InputError: they cannot be read, or have no effect.
        """
        from cocomix.inspection.notation import parse_steering

        if not self.steer and (self.positions != ALL or self.after_choice):
            raise InputError("--positions and --after-choice have no effect without --steer; give --steer")
        steering = parse_steering(
            self.steer,
            opened.catalog,
            self.positions,
            self.after_choice,
            catalog_command=opened.catalog_command,
        )
        try:
            opened.model.check_steering(steering)
        except ValueError as error:
            raise InputError(str(error)) from None
        if any("name:" in spec for spec in self.steer):
            concepts = dict.fromkeys(operation.concept for operation in steering.operations)
            status("Steered: " + ", ".join(f"{each} ({opened.names.get(each)})" for each in concepts))
        return steering

    def to_json(self, steering: Steering) -> dict[str, Any]:
        """Return the options as given, and the operations with the concepts that names resolved to."""
        distinct = dict.fromkeys((each.kind, each.concept, each.value) for each in steering.operations)
        operations = [{"kind": kind, "concept": concept, "value": value} for kind, concept, value in distinct]
        where = {"positions": self.positions, "after_choice": self.after_choice}
        return {"steering": self.steer, "operations": operations, **where}


def _count_or_all(written: Any) -> Any:
    """Return a number of concepts, or None for all."""
    return None if written == ALL else read_number(Concepts, written)


def inspect(
    *,
    run: Run = QUICKSTART,
    text: Annotated[str, argument("TEXT", "What the model reads.")],
    concepts: Annotated[
        int | None,
        typer.Option(metavar="N", parser=_count_or_all, help="Concepts of each token to show and to ablate, or `all`."),
    ] = 4,
    html: Annotated[Path | None, option("FILE", "Write a page.")] = None,
    run_option: RunOption = None,
    catalog: CatalogFolder = None,
    steer: Steer = None,
    positions: Positions = ALL,
    after_choice: AfterChoice = False,
    as_json: Json = False,
) -> None:
    """Show which concepts a model mixes while it reads a text.

    What each concept does to the next token is measured by its gradient and by ablation.
    """
    from cocomix.inspection.page import trace_page
    from cocomix.inspection.runs import model_folder, open_run
    from cocomix.inspection.terminal import trace_text
    from cocomix.inspection.tracing import trace

    if positions == "generated":
        raise InputError("--positions is generated, but a text that is only read has none; give all, or numbers")
    if html is not None:
        _check_page(html)
    opened = open_run(model_folder(run_option or run), catalog)
    mixed = opened.model.config.num_active_concepts
    shown = mixed if concepts is None else min(concepts, mixed)
    options = SteeringOptions(steer or [], positions, after_choice)
    steering = options.read(opened)
    if opened.catalog is None:
        status(opened.no_catalog)
    traced = trace(
        opened.model, opened.tokenizer, text, names=opened.names, steering=steering, ablate=shown, progress=True
    )
    if html is not None:
        try:
            files.write_output(html, trace_page(traced, f"What {opened.name} thinks", shown))
        except OSError as error:
            raise InputError(f"--html {html} cannot be written: {error.strerror}") from None
        status(f"Page: {html}")
    if as_json:
        show(json.dumps({"run": str(opened.folder), **options.to_json(steering), **traced.to_dict()}, indent=2))
    elif html is None:
        show(trace_text(traced, shown))


def _check_page(page: Path) -> None:
    """Raise InputError if a page cannot be written there."""
    if page.is_dir():
        raise InputError(f"--html {page} is a folder; give a file")
    if not page.parent.is_dir():
        raise InputError(f"--html {page}: there is no folder {page.parent}")


_generation = partial(setting, "cocomix.inspection.generation", "GenerationSettings")


def generate(
    *,
    run: Run = QUICKSTART,
    prompt: Annotated[str, argument("PROMPT", "What the text begins with.")],
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Print texts and most probable next tokens of the plain model next to the steered ones."
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None, option("N", "Maximum number of tokens to generate (default: 40).", Count)
    ] = None,
    temperature: Annotated[
        float | None,
        option("T", "Sampling temperature; 0 takes the most probable token (default: 0).", _generation("temperature")),
    ] = None,
    top_p: Annotated[
        float | None,
        option(
            "P",
            "Sample from the most probable tokens that together have probability P (default: 1).",
            _generation("top_p"),
        ),
    ] = None,
    seed: Annotated[int | None, option("S", "Sampling seed (default: 0).", Seed)] = None,
    num_beams: Annotated[int | None, option("N", "Beams of beam search (default: 1).", Batch)] = None,
    num_samples: Annotated[int | None, option("N", "Texts to print (default: 1).", Batch)] = None,
    run_option: RunOption = None,
    catalog: CatalogFolder = None,
    steer: Steer = None,
    positions: Positions = ALL,
    after_choice: AfterChoice = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt, with concepts turned up or down."""
    from cocomix.inspection.generation import GenerationSettings, continuations
    from cocomix.inspection.runs import model_folder, open_run
    from cocomix.models.steering import Steering

    chosen = given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        num_beams=num_beams,
        num_samples=num_samples,
    )
    settings = GenerationSettings(**chosen)
    if compare and not steer:
        raise InputError("--compare without --steer would print the same text twice; give --steer")
    opened = open_run(model_folder(run_option or run), catalog)
    options = SteeringOptions(steer or [], positions, after_choice)
    steering = options.read(opened)
    steered = continuations(opened, prompt, settings, steering)
    plain = continuations(opened, prompt, settings, Steering()) if compare else None
    following = _next_tokens(opened, prompt, steering) if compare else None
    if as_json:
        texts: dict[str, Any] = {"steered" if steer else "plain": steered}
        texts |= {"plain": plain} if plain is not None else {}
        if following is not None:
            texts["next_tokens"] = {name: [each._asdict() for each in side] for name, side in following.items()}
        about = {"run": str(opened.folder), "prompt": prompt, **options.to_json(steering), **asdict(settings)}
        show(json.dumps(about | texts, indent=2))
    else:
        _show_texts(prompt, options.steer, steered, plain)
    if following is not None and not as_json:
        _show_next_tokens(following, options.steer)


def _next_tokens(opened: OpenRun, prompt: str, steering: Steering) -> dict[str, list[NextToken]]:
    """Return the most probable tokens after the prompt, plain and steered."""
    from cocomix.inspection.effects import most_probable, next_token_probabilities
    from cocomix.inspection.tracing import text_ids

    ids = text_ids(opened.tokenizer, prompt, opened.model.config.max_position_embeddings)
    both = next_token_probabilities(opened.model, ids, [None, steering.after_prompt(len(ids))])
    return {name: most_probable(opened.tokenizer, each) for name, each in zip(("plain", "steered"), both, strict=True)}


def _show_next_tokens(following: dict[str, list[NextToken]], steer: list[str]) -> None:
    """Print the most probable tokens after the prompt, plain next to steered."""
    from cocomix.common.console import visible
    from cocomix.inspection.terminal import side_by_side

    plain, steered = (
        "\n".join(f"{each.probability:6.1%} «{visible(each.token)}»" for each in following[name])
        for name in ("plain", "steered")
    )
    titles = ("next token, plain", "next token, steered: " + ", ".join(steer))
    show("\n" + side_by_side(plain, steered, titles, shutil.get_terminal_size().columns))


def _show_texts(prompt: str, steer: list[str], steered: list[str], plain: list[str] | None) -> None:
    """Print texts, each next to that of the plain model if there is one."""
    from cocomix.inspection.terminal import harmless, side_by_side

    if plain is None:
        show("\n\n".join(harmless(prompt + text) for text in steered))
        return
    columns = shutil.get_terminal_size().columns
    titles = ("plain", "steered: " + ", ".join(steer))
    pairs = [
        side_by_side(harmless(prompt + one), harmless(prompt + other), titles, columns)
        for one, other in zip(plain, steered, strict=True)
    ]
    show("\n\n".join(pairs))
