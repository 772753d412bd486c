"""The protocol of steering scores: choices, arms, control, figures."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

from cocomix.common.errors import InputError
from cocomix.concepts.teacher import freeze
from cocomix.data.tokenizer import train_tokenizer
from cocomix.evaluation.steering_arms import NamingPrompt, Request, SteeredStudent, SteeredTeacher, Writer
from cocomix.evaluation.steering_curve import Line, estimate, picture
from cocomix.evaluation.steering_judge import Readings
from cocomix.evaluation.steering_score import Pair, ScoreSettings, choose_concepts, measure
from cocomix.inspection.sampling import SharedNoise, continuation

PROMPTS = ["the red fox", "a stone in"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the red fox jumps over a stone in the river"] * 3, 270)


@pytest.fixture
def student(random_model, tokenizer) -> Writer:
    model = random_model(backbone={"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}).float()
    return Writer(model, tokenizer, PROMPTS, tokens=6, seed=3)


@pytest.fixture
def arms(student: Writer, random_teacher, tokenizer):
    teacher = freeze(random_teacher("llama", vocab_size=len(tokenizer)).float())
    return {
        "student": SteeredStudent(student, [2.0], "add", 10.0),
        "teacher": SteeredTeacher(student._replace(model=teacher), [1.0], 1, torch.randn(40, 32), norm=50.0),
        "prompt": NamingPrompt(student, [3], {concept: ["river", " fox", "zz"] for concept in range(40)}),
    }


@pytest.mark.parametrize("name", ["student", "teacher", "prompt"])
def test_strength_0_is_the_unsteered_text_and_others_are_not(arms, name: str) -> None:
    """Whatever the concept, and whatever else is in the batch."""
    arm = arms[name]
    plain = arm.writer.write([Request(0, 0, 0.0), Request(1, 0, 0.0)])
    mixed = arm.write([Request(1, 5, 0.0), Request(0, 7, arm.strengths[0]), Request(0, 9, 0.0)])
    assert (mixed[0], mixed[2]) == (plain[1], plain[0])
    assert mixed[1] != plain[0]
    assert arm.write([Request(0, 7, arm.strengths[0])]) == [mixed[1]]


def test_scaling_by_1_is_no_steering(student: Writer) -> None:
    arm = SteeredStudent(student, [2.0], "scale", 10.0)
    plain = student.write([Request(0, 0, 0.0)])
    assert arm.write([Request(0, 4, 1.0)]) == plain


def test_texts_depend_on_the_seed_alone(student: Writer) -> None:
    requests = [Request(0, 0, 0.0), Request(1, 0, 0.0)]
    assert student.write(requests) == student.write(requests)
    assert student.write(requests) != student._replace(seed=4).write(requests)


def test_the_noise_of_a_prompt_samples_its_softmax() -> None:
    """Rows of one prompt agree, and over many steps tokens come as often as they are probable."""
    noise = SharedNoise([0, 1, 0], 2, seed=0)
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(3, 3)
    drawn = torch.stack([noise(torch.empty(0), logits).argmax(-1) for _ in range(4000)])
    assert torch.equal(drawn[:, 0], drawn[:, 2]) and not torch.equal(drawn[:, 0], drawn[:, 1])
    shares = torch.bincount(drawn[:, 0], minlength=3) / 4000
    assert shares.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_what_is_named_has_room_and_stands_before_the_prompt(arms, student: Writer, monkeypatch) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(
        "cocomix.evaluation.steering_arms.sample",
        lambda model, tokenizer, beginnings, *rest, **_: seen.extend(beginnings) or [],
    )
    arms["prompt"].write([Request(0, 1, 2)])
    assert student.tokenizer.decode(seen[-1]) == "river, fox\nthe red fox"
    long = NamingPrompt(student, [1], {1: ["river " * 60]})
    long.write([Request(0, 1, 1)])
    assert len(seen[-1]) == 64 - 6
    assert student.tokenizer.decode(seen[-1]).endswith("the red fox")


def test_a_blank_before_a_continuation_is_kept() -> None:
    words = {0: "a", 1: "b", 2: "c"}
    drops_first_blank = SimpleNamespace(decode=lambda ids, **_: " ".join(words[each] for each in ids))
    assert continuation(drops_first_blank, [0, 1], [2]) == " c"


def test_concepts_of_every_band_and_controls_of_equal_frequency() -> None:
    frequencies = np.array([0.5, 0.4, 0.3] + [0.05] * 20 + [0.002] * 20 + [0.0] * 5)
    eligible = frequencies > 0
    eligible[4] = False
    pairs = choose_concepts(frequencies, eligible, 9, seed=1)
    concepts = [pair.concept for pair in pairs]
    assert concepts == sorted(set(concepts)) and eligible[concepts].all()
    assert [sum(low <= concept < high for concept in concepts) for low, high in ((0, 3), (3, 23), (23, 43))] == [
        3,
        3,
        3,
    ]
    for pair in pairs:
        assert pair.control != pair.concept and eligible[pair.control]
        if pair.concept >= 3:
            assert frequencies[pair.control] == frequencies[pair.concept]
    assert (
        pairs == choose_concepts(frequencies, eligible, 9, seed=1) != choose_concepts(frequencies, eligible, 9, seed=2)
    )
    with pytest.raises(InputError, match="only 42 are labels and active"):
        choose_concepts(frequencies, eligible, 43, seed=0)


class Recorder:
    """Writes what it was asked for, and judges that: concept 4 is active where 4 was turned up, 2 always, half."""

    name, unit, strengths = "recorder", "", (1.0, 3.0)
    watched = (2, 4)

    def write(self, requests: Sequence[Request]) -> list[str]:
        return [f"{request.prompt} {request.concept} {request.strength}" for request in requests]

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> Readings:
        rows = [text.split() for text in texts]
        assert [PROMPTS[int(row[0])] for row in rows] == list(prompts)
        strength = np.array([float(row[2]) for row in rows])
        turned_up = np.array([[int(row[1]) == each for each in self.watched] for row in rows])
        activation = np.stack([np.full(len(rows), 0.5), 2 * turned_up[:, 1] * strength], axis=1)
        ones = np.ones(len(rows))
        return Readings(activation, activation > 0, 3 + 0.1 * strength, ones, ones)


def test_gain_control_and_cost_are_differences_to_the_unsteered_text() -> None:
    pairs = [Pair(2, 4), Pair(4, 2)]
    recorder = Recorder()
    found = measure(recorder, recorder, PROMPTS, pairs, np.array([1.0, 4.0]), 3, tqdm(disable=True))
    assert found.gains.tolist() == [[0.0, 0.5], [0.0, 1.5]]
    first, second = found.points
    assert (first.strength, first.gain.mean, first.control.mean, first.specific.mean) == (1.0, 0.25, 0.0, 0.25)
    assert second.gain.mean == 0.75 and second.gain.interval == (0.0, 1.5)
    assert second.cost.mean == pytest.approx(0.3) == second.control_cost.mean
    assert second.perplexity == pytest.approx(np.exp(3.3))
    assert second.active.mean == 0.5
    assert picture([Line("recorder", found.points)], "a title").startswith(b"\x89PNG")


def test_an_interval_narrows_with_the_number_of_concepts_and_repeats() -> None:
    values = np.random.default_rng(0).normal(1.0, 0.5, 400)
    few, many = estimate(values[:20]), estimate(values)
    assert few.interval[0] < few.mean < few.interval[1]
    assert many.interval[1] - many.interval[0] < few.interval[1] - few.interval[0]
    assert many.interval[1] - many.interval[0] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert estimate(values) == many


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concepts": 1}, "concepts is 1; expected a whole number from 2"),
        ({"prompts": 0}, "prompts is 0; expected a whole number from 1"),
        ({"strengths": (0.0,)}, "strengths\\[0\\] is 0.0; expected a number above 0"),
        ({"strengths": (float("nan"),)}, "strengths\\[0\\] is nan"),
        ({"strengths": (2.0, 2.0)}, "one or more different numbers"),
        ({"operation": "scale", "strengths": (1.0,)}, "strengths has 1.0; a factor"),
        ({"teacher_strengths": ()}, "teacher_strengths is "),
        ({"named_tokens": (0,)}, "named_tokens\\[0\\] is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScoreSettings(**changes)
