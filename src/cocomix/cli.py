"""The command line: commands to functions, and a person's mistakes to one line each."""

from __future__ import annotations

import argparse
import errno
import json
import sys
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from cocomix import (
    __version__,
    cli_app,
    cli_concepts,
    cli_evaluate,
    cli_inspect,
    cli_plan,
    files,
    processes,
    starting,
)
from cocomix.cli_options import OptionParser, require_once
from cocomix.console import end_progress_bars, prepare_streams, say, show
from cocomix.errors import InputError

USER_ERROR = 2
PIPE_CLOSED = 141
LONGEST_LINE = 300
_RESUME = "; what is finished is kept, and the same command continues from there"
REMEDIES = {
    errno.ENOSPC: f": free some space{_RESUME}",
    errno.EDQUOT: f": free some space{_RESUME}",
    errno.EFBIG: f": raise the limit on the size of a file (ulimit -f){_RESUME}",
    errno.EACCES: ": give the right to read or write it, or choose another folder",
    errno.EROFS: ": choose an output folder that can be written to",
}
"""What to do about a failure of the system, by its number."""


class RecipeCommand(NamedTuple):
    """A command that runs a recipe up to one of its stages."""

    summary: str
    until: str


RECIPE_COMMANDS = {
    "run": RecipeCommand("run a whole recipe: from text to compared models", "report"),
    "data": RecipeCommand("run a recipe up to the corpus: text, tokenizer, packed blocks", "corpus"),
    "teacher": RecipeCommand("run a recipe up to the teacher", "teacher"),
    "sae": RecipeCommand("run a recipe up to the sparse autoencoder", "sae"),
    "label": RecipeCommand("run a recipe up to the concept labels", "labels"),
    "concepts": RecipeCommand(
        "run a recipe up to the concept catalogue; also: concepts search TEXT | show ID | name", "catalog"
    ),
    "train": RecipeCommand("run a recipe up to the students, without the report", "students"),
}
OPTIONS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "train": {"--only": ("--only NAME", {"metavar": "NAME", "help": "train just this student"})},
    "label": {
        "--inspect": ("--inspect", {"action": "store_true", "help": "print and draw how often which labels occur"}),
        "--student-tokenizer": (
            "--student-tokenizer SOURCE",
            {"metavar": "SOURCE", "help": "label for students with this tokenizer, not the teacher's"},
        ),
    },
}
"""Options of a recipe's commands that are not recipe keys: how usage shows them, and what argparse is told."""
QUICKSTART = "quickstart"
COMPARE = "compare"
EVALUATE = "evaluate"
PLAN = "plan"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0; 2 for a mistake in the input or a failure of the system, one line each on stderr; 130 when
        interrupted; 141 when nobody reads the results any more.
    """
    starting.interruption_is_an_exception()
    prepare_streams()
    try:
        _quiet_libraries()
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except BrokenPipeError:
        return PIPE_CLOSED
    except (InputError, OSError) as error:
        end_progress_bars()
        for line in in_lines(error):
            sys.stderr.write(f"cocomix: {line}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("\ncocomix: interrupted; the same command goes on from here\n")
        return starting.INTERRUPTED


def in_lines(error: InputError | OSError) -> list[str]:
    """Return what to tell the user: the lines of an InputError, or one line that names what the system refused."""
    if isinstance(error, InputError):
        return str(error).splitlines()
    if error.errno is None or error.strerror is None:  # raised by a library
        return [" ".join(str(error).split())[:LONGEST_LINE]]
    where = "" if error.filename is None else f"{error.filename}: "
    return [f"{where}{error.strerror}{REMEDIES.get(error.errno, '')}"]


def _quiet_libraries() -> None:
    """Hide the libraries' progress bars and notes to developers; warnings, which may concern a figure, are shown."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="cocomix",
        description="Pretrain language models that think in continuous concepts.",
        epilog="Every recipe key is also an option: --training.max_tokens 1000000. COMMAND --help lists them.",
    )
    parser.add_argument("--version", action="version", version=f"cocomix {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary, add_help=name == COMPARE)
        command.add_argument("--json", action="store_true", help="print the results as JSON")
        return command

    add(QUICKSTART, "run the quickstart recipe: a small comparison from text that every machine has")
    for name, (summary, _) in RECIPE_COMMANDS.items():
        command = add(name, summary)
        command.add_argument("recipe", metavar="RECIPE", help="recipe file (YAML)")
        for option, (_, about) in OPTIONS.get(name, {}).items():
            command.add_argument(option, **about)
    add(EVALUATE, "evaluate a trained model on text and on tasks")
    add(PLAN, "compute what a recipe will cost: parameters, FLOPs, memory, storage, hours")
    for name, summary in (cli_inspect.COMMANDS | {cli_app.COMMAND: cli_app.SUMMARY}).items():
        add(name, summary)
    command = add(COMPARE, "compare finished runs on the same corpus")
    command.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a trained model")
    command.add_argument("--output", metavar="FOLDER", type=Path, help="write the report there")
    return parser


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else ""
    require_once(arguments)
    if processes.count() > 1 and command not in (QUICKSTART, *RECIPE_COMMANDS):
        if not processes.is_first():
            return USER_ERROR
        raise InputError(f"cocomix {command} runs in one process; start it without torchrun")
    if command == "concepts" and arguments[1:2] and arguments[1] in cli_concepts.COMMANDS:
        return cli_concepts.run(arguments[1:])
    if command == EVALUATE:
        return cli_evaluate.run(arguments[1:])
    if command == PLAN:
        return cli_plan.run(arguments[1:])
    if command in cli_inspect.COMMANDS:
        return cli_inspect.run(arguments)
    if command == cli_app.COMMAND:
        return cli_app.run(arguments)
    if command in (QUICKSTART, *RECIPE_COMMANDS) and {"-h", "--help"} & set(arguments):
        return _recipe_help(command)
    options, overrides = _parser().parse_known_args(arguments)
    if options.command == COMPARE:
        return _compare(options, overrides)

    from cocomix.recipe import load_recipe

    path = quickstart_recipe() if command == QUICKSTART else options.recipe
    if command == "label":
        if Path(path).is_dir():
            return _inspect_folder(options, overrides)
        if options.student_tokenizer is not None:
            overrides += ["--tokenizer.source", options.student_tokenizer, "--labels.alignment", "characters"]
    processes.wait_for_first()
    recipe = load_recipe(path, overrides)
    until = "report" if command == QUICKSTART else RECIPE_COMMANDS[command].until

    from cocomix import workflow

    if until == "report":
        results = workflow.run_recipe(recipe)
        if results is not None:
            _show_results(results, files.located(recipe.output), str(path), options.json)
        return 0
    pipeline = workflow.run_until(recipe, until, getattr(options, "only", None))
    if not processes.is_first():
        return 0
    if getattr(options, "inspect", False):
        return _show_labels(pipeline.labels_folder(), options.json)
    records = {stage.name: stage.record().summary for stage in pipeline.stages() if stage.is_done()}
    if options.json:
        show(json.dumps(records, indent=2))
    else:
        say(f"Done: {pipeline.folder}")
    return 0


def _inspect_folder(options: argparse.Namespace, overrides: list[str]) -> int:
    if not options.inspect or overrides:
        raise InputError(
            f"{options.recipe} is a folder; give a recipe, or for a labelled corpus just: "
            f"cocomix label {options.recipe} --inspect"
        )
    return _show_labels(Path(options.recipe), options.json)


def _show_labels(folder: Path, as_json: bool) -> int:
    from cocomix import workflow

    statistics = workflow.inspect_labels(folder)
    if as_json:
        show(json.dumps({side: found.figures() for side, found in statistics.items()}, indent=2))
        return 0
    for side, found in statistics.items():
        show(f"\n{side}\n{found.table()}")
    show(f"\n{workflow.labelling_remarks(folder)}")
    show(f"\nCurve: {folder / workflow.CURVE_FILE}")
    return 0


def quickstart_recipe() -> Path:
    """The quickstart recipe: of the checkout, or of the installed package."""
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    if not recipe.is_file():
        recipe = Path(str(resources.files("cocomix") / "recipes" / "quickstart.yaml"))
    return recipe.relative_to(Path.cwd()) if recipe.is_relative_to(Path.cwd()) else recipe


def _recipe_help(command: str) -> int:
    from cocomix.recipe import Recipe
    from cocomix.settings_help import describe

    summary = RECIPE_COMMANDS[command].summary if command != QUICKSTART else "run the quickstart recipe"
    recipe = "" if command == QUICKSTART else " RECIPE"
    more = "".join(f" [{usage}]" for usage, _ in OPTIONS.get(command, {}).values())
    show(f"usage: cocomix {command}{recipe}{more} [--json] [--KEY VALUE ...]\n")
    show(f"{summary}. Every key of the recipe can be overridden by an option:\n")
    show("\n".join(describe(Recipe)))
    return 0


def _compare(options: argparse.Namespace, unknown: list[str]) -> int:
    if unknown:
        raise InputError(f"unknown option {unknown[0]}; see cocomix compare --help")

    from cocomix import workflow

    results = workflow.compare(options.runs, options.output)
    if options.json:
        show(json.dumps(results, indent=2))
    else:
        _show_tables(results)
        if options.output:
            show(f"\nReport: {files.located(options.output) / 'report.html'}")
    return 0


def _show_tables(results: dict[str, Any]) -> None:
    from cocomix.evaluation.report import concepts_table, equal_cost_table, students_table
    from cocomix.evaluation.tables import evaluation_tables
    from cocomix.evaluation.wording import comparison_sentences, concept_sentences, verdict_note

    show("\n" + students_table(results))
    show("\n" + equal_cost_table(results))
    if concepts := concepts_table(results["students"]):
        show("\n" + concepts)
    for measured in evaluation_tables(results["evaluations"]):
        show("\n" + measured)
    note = verdict_note(results)
    for sentence in (
        *concept_sentences(results["students"]),
        *comparison_sentences(results),
        *([note] if note else []),
    ):
        show("\n" + sentence.replace("`", ""))


def _show_results(results: dict[str, Any], folder: Path, recipe: str, as_json: bool) -> None:
    if as_json:
        show(json.dumps(results, indent=2))
        return

    from cocomix.evaluation.wording import caveats

    _show_tables(results)
    show("\n" + caveats(results)[0])
    show(f"\nReport:  {folder / 'report' / 'report.html'}\nFigures: {folder / 'report' / 'results.json'}")
    show(f"Models:  {folder / 'students'}")
    if steps := next_steps(results, folder, recipe):
        show(steps)


def next_steps(results: dict[str, Any], folder: Path, recipe: str) -> str:
    """Commands to go on with after `recipe`: its first cocomix student read, mixed the other way, and on other text."""
    mixed = next((name for name, run in results["students"].items() if run["method"] == "cocomix"), None)
    if mixed is None or mixed not in results["groups"]:
        return ""

    from cocomix.workflow import program

    call, model = program(), folder / "students" / mixed
    mixer = results["recipe"]["students"][mixed]["mixer"] or {}
    other = "interleave" if mixer.get("mixing") == "add" else "add"
    return (
        "\nThings to try next:\n"
        f"  {call} inspect 'import os' --run {model}\n"
        f"  {call} run {recipe} --students.{mixed}.mixer.mixing {other} --output {folder}-{other}\n"
        f"  {call} compare {model} {folder}-{other}/students/{mixed} --output {folder}-mixings\n"
        f"  {call} run {recipe} --corpus.source PATH/TO/YOUR/TEXT --output {folder}-mine"
    )
