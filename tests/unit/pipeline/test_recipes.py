"""The recipes that come with the program can be run as they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cocomix.concepts.labeling import LabelsConfig
from cocomix.data.corpus import CorpusConfig
from cocomix.data.tokenizer import TokenizerConfig, train_tokenizer
from cocomix.pipeline import preflight
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.methods import StudentConfig
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.recipe_file import load_recipe
from cocomix.pipeline.students import StudentContext, student_config
from cocomix.training.config import TrainingConfig

FOLDER = Path(__file__).parents[3] / "recipes"
RECIPES = [
    path
    for path in sorted(FOLDER.glob("*.yaml"))
    if not path.stem.startswith(("gpt2-", "llama-"))  # of clusters: tests/unit/planning/test_paper_recipes.py
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_no_problems_and_students_that_can_be_built(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.problems() == []
    assert (recipe.name, recipe.output) == (path.stem, f"runs/{path.stem}")
    context = Pipeline(recipe).student_context(recipe.tokenizer.vocab_size, eos_token_id=0)
    for name in recipe.students:
        student_config(recipe, name, context)


@pytest.mark.parametrize("path", sorted((FOLDER / "evidence").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_of_the_study_has_no_problems_and_students_that_can_be_built(path: Path) -> None:
    """Those that go on from another's teacher and SAE are built with its sizes."""
    recipe = load_recipe(path)
    assert recipe.problems() == []
    assert (recipe.name, recipe.output) == (f"evidence-{path.stem}", f"runs/evidence/{path.stem}")
    context = StudentContext(vocab_size=2048, eos_token_id=0, num_concepts=1024, teacher_hidden_size=192)
    for name in recipe.students:
        student_config(recipe, name, context)


def test_the_ablations_hold_the_papers_set() -> None:
    """Section 4.3: selection, target, components, conditioning, pause tokens with and without distillation."""
    students = load_recipe(next(path for path in RECIPES if path.stem == "ablations")).students
    mixers = [student.mixer for student in students.values() if student.method == "cocomix" and student.mixer]
    assert {"ntp", "kd", "pause", "mtp", "cocomix"} == {student.method for student in students.values()}
    assert any(student.method == "pause" and student.distillation for student in students.values())
    assert {mixer.mixing for mixer in mixers} == {"interleave", "add", "none"}
    assert {m.regression_loss for m in mixers if m.content == "hidden_states"} == {"l1", "l2", "cosine"}
    assert 0.0 in {mixer.concept_loss_weight for mixer in mixers}
    selections = {student.labels.selection for student in students.values() if student.labels}
    assert {"activation", "attribution_abs", "attribution_negative"} <= selections


def test_a_student_trains_by_its_own_keys_and_otherwise_by_the_recipes() -> None:
    students = {
        "plain": StudentConfig("ntp"),
        "fast": StudentConfig("ntp", learning_rate=0.1),
        "long": StudentConfig("ntp", training={"max_tokens": 8_000_000, "schedule": "wsd", "learning_rate": 0.2}),
    }
    recipe = Recipe("tiny", "out", students=students)
    trained = {name: recipe.training_of(student) for name, student in students.items()}
    assert trained["plain"] == recipe.training
    assert trained["fast"] == dataclasses.replace(recipe.training, learning_rate=0.1)
    own = {"max_tokens": 8_000_000, "schedule": "wsd", "learning_rate": 0.2}
    assert trained["long"] == dataclasses.replace(recipe.training, **own)
    recorded = recipe.to_dict()["students"]["long"]
    assert (recorded["learning_rate"], recorded["training"]) == (0.2, {"max_tokens": 8_000_000, "schedule": "wsd"})
    stage = Pipeline(recipe).student_stages["long", 0]
    assert stage.settings["training"] == dataclasses.asdict(trained["long"])
    folded = dataclasses.replace(recipe, training=trained["long"], students={"long": StudentConfig("ntp")})
    assert Pipeline(folded).student_stages["long", 0].settings == stage.settings


def test_training_keys_of_a_student_that_cannot_work_are_named() -> None:
    wrong = {"training": {"tokens_per_step": 4097, "learning_rate": 0.1}}
    recipe = Recipe("tiny", "out", students={"ntp": StudentConfig("ntp", learning_rate=0.1, **wrong)})
    size, rates = recipe.problems()
    assert size.startswith("students.ntp.training.tokens_per_step is 4097; it must be a multiple of")
    assert rates == "students.ntp: learning_rate and training.learning_rate are both given; leave one of them out"


def test_muon_needs_complete_matrices() -> None:
    students = {"ntp": StudentConfig("ntp"), "muon": StudentConfig("ntp", training={"optimizer": "muon"})}
    recipe = Recipe("tiny", "out", students=students)
    assert recipe.problems() == []
    assert dataclasses.replace(recipe, parallel="fsdp").problems() == [
        "students.muon.training.optimizer is 'muon', which needs complete matrices; set parallel to ddp"
    ]


def branches(**branch: Any) -> Recipe:
    wsd = TrainingConfig(schedule="wsd", max_tokens=4096 * 100, warmup_ratio=0.1, decay_ratio=0.2)
    own = {"method": "ntp", "branch_from": "long", "training": {"max_tokens": 4096 * 50}, **branch}
    return Recipe("tiny", "out", training=wsd, students={"short": StudentConfig(**own), "long": StudentConfig("ntp")})


def test_a_branch_leaves_the_stable_phase_where_its_decay_begins() -> None:
    recipe = branches()
    assert recipe.problems() == []
    assert recipe.branch_steps("long") == [40] and recipe.branch_steps("short") == []
    stages = Pipeline(recipe).student_stages
    assert stages["long", 0] in stages["short", 0].needs  # trained first, and its fingerprint is recorded
    assert "branch_from" in stages["short", 0].settings["student"]


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        ({"branch_from": "lng"}, "branch_from is 'lng'; expected another student, not a branch: long"),
        ({"training": {"schedule": "cosine"}}, "branch_from needs the schedule wsd for short and long"),
        ({"method": "mtp"}, "a branch has the settings of long, except for its training"),
        ({"training": {"weight_decay": 0.3}}, "the training of a branch differs from that of long in max_tokens"),
        (
            {"training": {"max_tokens": 4096 * 300}},
            "the decay begins after 983,040 tokens, outside the stable phase of",
        ),
        ({"training": {"max_tokens": 4096 * 10}}, "the decay begins after 32,768 tokens, outside the stable phase of"),
    ],
)
def test_branches_that_cannot_be_are_refused(branch: dict[str, Any], message: str) -> None:
    (line,) = branches(**branch).problems()
    assert line.startswith(f"students.short: {message}")


def test_an_offset_of_labels_beyond_the_block_is_refused() -> None:
    recipe = Recipe("name", "out", block_size=64, students={"cocomix": StudentConfig("cocomix")})
    assert dataclasses.replace(recipe, labels=LabelsConfig(offset=63)).problems() == []
    (line,) = dataclasses.replace(recipe, labels=LabelsConfig(offset=64)).problems()
    assert line == "labels.offset is 64, in blocks of 64 tokens; give less"


@pytest.mark.parametrize(("training", "lines"), [({}, 0), ({"tokens_per_evaluation": 100_000}, 1)])
def test_a_single_evaluation_is_warned_about(training: dict[str, int], lines: int, capsys) -> None:
    recipe = Recipe("name", "out", training=TrainingConfig(max_tokens=100_000, **training))
    recipe.students = {"ntp": StudentConfig("ntp")}
    preflight._warn_of_single_evaluations(recipe)
    assert capsys.readouterr().err.count("so there is one evaluation, at the end") == lines
    assert TrainingConfig(max_tokens=100_000).tokens_per_evaluation == 10_000


@pytest.mark.parametrize(("parallel", "lines"), [("ddp", 0), ("fsdp+cpu-offload", 1)])
def test_sharing_a_model_with_nobody_is_warned_about(parallel: str, lines: int, capsys) -> None:
    preflight._warn_of_single_process(Recipe("name", "out", parallel=parallel))
    assert capsys.readouterr().err.count("which has no effect on a single process") == lines


@pytest.mark.parametrize(("stated", "is_reported"), [(4096, False), (257, False), (999, True)])
def test_a_vocabulary_size_that_is_not_the_tokenizers_is_reported(stated, is_reported, tmp_path, capsys):
    train_tokenizer(["a text"], 257).save_pretrained(str(tmp_path))
    recipe = Recipe("name", "out", corpus=CorpusConfig("text"), tokenizer=TokenizerConfig(str(tmp_path), stated))
    preflight._warn_of_idle_vocab_size(recipe)
    expected = f"Warning: tokenizer.vocab_size is {stated}, which has no effect, because tokenizer.source {tmp_path} "
    expected += "has 257 tokens; leave tokenizer.vocab_size out\n"
    assert capsys.readouterr().err == (expected if is_reported else "")
