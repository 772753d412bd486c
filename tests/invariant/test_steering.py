"""Steering: what becomes of the logits, and that cache, batch, beams and padding change nothing about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cocomix import CoCoMixForCausalLM, Steering
from cocomix.models.steering import Operation, steer_active, steer_batch, steer_logits_

KINDS = ("gpt2", "llama")
SEVERAL = (
    Steering.add({3: 4.0, 7: -2.0})
    + Steering.scale({11: 5.0}, positions=slice(4, None))
    + Steering.set({2: 6.0}, positions=[1, 3, 12])
    + Steering.suppress([5, 6])
    + Steering.scale({3: -1.0}, after_choice=True)
)
IDS = torch.arange(1, 19).view(2, 9)


def steered_logits(z: Tensor, steering: Any, positions: Tensor | None = None) -> Tensor:
    """What becomes of z (B, T, C) before the choice."""
    positions = torch.arange(z.shape[1])[None] if positions is None else positions
    batch = steer_batch(steering, positions, len(z))
    assert batch is not None
    return steer_logits_(z.clone(), batch)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class Mixed:
    """What the mixer of a model mixed in, pass by pass."""

    def __init__(self, model: CoCoMixForCausalLM) -> None:
        self.passes: list[Any] = []
        model.mixer.register_forward_hook(lambda _module, _inputs, output: self.passes.append(output))


# Operations by hand


@pytest.mark.parametrize(
    ("steering", "expected"),
    [
        ({1: 4.0}, [2.0, 1.0, -1.0]),
        (Steering.add({1: -2.0}), [2.0, -5.0, -1.0]),
        (Steering.scale({0: 5, 1: -2}), [10.0, 6.0, -1.0]),
        (Steering.set({2: 0.5}), [2.0, -3.0, 0.5]),
        (Steering.suppress([0]), [-torch.inf, -3.0, -1.0]),
        (Steering.add({1: 1.0}) + Steering.scale({1: 2.0}), [2.0, -4.0, -1.0]),
        (Steering.scale({1: 2.0}) + Steering.add({1: 1.0}), [2.0, -5.0, -1.0]),
        (Steering.suppress([1]) + Steering.scale({1: 0.0}), [2.0, -torch.inf, -1.0]),
    ],
    ids=str,
)
def test_operations_on_logits(steering, expected):
    z = torch.tensor([[[2.0, -3.0, -1.0]]])
    assert steered_logits(z, steering).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("positions", "where"),
    [
        ("all", [0, 1, 2, 3]),
        ([2, 0], [0, 2]),
        (slice(2, None), [2, 3]),
        (slice(1, 3), [1, 2]),
        (range(0, 4, 2), [0, 2]),
        (torch.tensor([3]), [3]),
        ([9], []),
    ],
    ids=str,
)
def test_positions(positions, where):
    z = torch.zeros(1, 4, 2)
    found = steered_logits(z, Steering.add({1: 1.0}, positions=positions))
    assert found[0, :, 1].nonzero().flatten().tolist() == where
    assert not found[0, :, 0].any()


def test_steering_prints_as_the_expression_that_builds_it():
    steering = Steering.add({123: -4.5}) + Steering.suppress([9], positions="generated")
    steering += Steering.set({7: 2}, positions=[3, 5], after_choice=True)
    assert eval(repr(steering)) == steering


def test_positions_are_those_of_the_text_and_not_of_the_batch():
    found = steered_logits(
        torch.zeros(2, 3, 1), Steering.add({0: 1.0}, positions=[1]), torch.tensor([[0, 1, 2], [0, 0, 1]])
    )
    assert found[..., 0].tolist() == [[0, 1, 0], [0, 0, 1]]


def test_operations_after_the_choice_change_kept_values_alone():
    values, indices = torch.tensor([[[3.0, 2.0]], [[3.0, 2.0]]]), torch.tensor([[[4, 1]], [[1, 4]]])
    steering = Steering.scale({4: 5.0}, after_choice=True) + Steering.set({9: 1.0}, after_choice=True)
    batch = steer_batch(steering + Steering.add({4: 100.0}), torch.zeros(1, 1), 2)
    assert steer_active(values, indices, batch).tolist() == [[[15.0, 2.0]], [[3.0, 10.0]]]
    batch = steer_batch([None, Steering.suppress([4], after_choice=True)], torch.zeros(1, 1), 2)
    assert steer_active(values, indices, batch).tolist() == [[[3.0, 2.0]], [[3.0, 0.0]]]


def test_adding_everywhere_is_adding_to_the_bias_of_the_prediction(random_model):
    model = random_model()
    ids = torch.arange(6)[None]
    steered = model(ids, steering={3: 2.5}).logits
    with torch.no_grad():
        model.mixer.predict.bias[3] += 2.5
    torch.testing.assert_close(model(ids).logits, steered)


@torch.no_grad()
def test_a_raised_concept_enters_in_the_place_of_the_weakest(random_model):
    model = random_model()
    mixed = Mixed(model)
    z = model(IDS, output_concepts=True).concept_logits
    before = mixed.passes[0].active.indices
    outside = int(z[0, 4].argmin())
    model(IDS, steering=Steering.set({outside: 100.0}, positions=[4]))
    kept = mixed.passes[1].active
    assert kept.indices[0, 4].tolist() == [outside, *before[0, 4, :-1].tolist()]
    assert kept.values[0, 4, 0] == 100.0
    assert torch.equal(kept.indices[:, :4], before[:, :4])
    # After the choice it is too late to enter; a scaled logit that stays small stays out.
    for steering in (Steering.set({outside: 100.0}, after_choice=True), Steering.scale({outside: 0.5})):
        model(IDS, steering=steering)
        assert torch.equal(mixed.passes.pop().active.indices[0, 4], before[0, 4])


@torch.no_grad()
def test_a_suppressed_concept_leaves_for_the_next(random_model):
    model = random_model()
    mixed = Mixed(model)
    z = model(IDS, output_concepts=True).concept_logits
    first = int(z[0, 4].argmax())
    model(IDS, steering=Steering.suppress([first]))
    assert mixed.passes[1].active.indices[0, 4].tolist() == z[0, 4].topk(6).indices[1:].tolist()
    assert not (mixed.passes[1].active.indices == first).any()
    model(IDS, steering=Steering.suppress([first], after_choice=True))
    kept = mixed.passes[2].active
    assert kept.indices[0, 4, 0] == first and kept.values[0, 4].tolist() == [0.0, *z[0, 4].topk(5).values[1:].tolist()]


@torch.no_grad()
def test_suppressed_concepts_add_nothing_where_no_other_is_left(random_model):
    model = random_model(num_concepts=6)
    mixed = Mixed(model)
    logits = model(IDS, steering=Steering.suppress(range(6)) + Steering.scale({1: 0.0})).logits
    assert not mixed.passes[0].active.values.any()
    assert torch.isfinite(logits).all()
    after = Steering.suppress(range(6), after_choice=True)
    assert_equal(model(IDS, steering=after).logits, logits)


# Nothing changes where nothing should


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_strength_zero_and_no_steering_are_bit_identical(kind, dtype, random_model):
    model = random_model(kind).to(dtype)
    plain = model(IDS, output_concepts=True)
    neutral = Steering.add({3: 0, 4: 0.0}) + Steering.scale({5: 1.0}, after_choice=True)
    nowhere = Steering.suppress([3], positions=[])
    elsewhere = Steering.suppress([3], positions=[40])
    for steering in ({}, {3: 0.0}, neutral, nowhere, elsewhere, [None, {7: 0.0}], Steering()):
        out = model(IDS, steering=steering, output_concepts=True)
        assert torch.equal(out.logits, plain.logits)
        assert torch.equal(out.concept_logits, plain.concept_logits)


@torch.no_grad()
def test_steering_changes_no_earlier_token(random_model):
    model = random_model("llama")
    plain, out = model(IDS).logits, model(IDS, steering=Steering.add({3: 50.0}, positions=slice(5, None))).logits
    assert torch.equal(out[:, :5], plain[:, :5])
    assert (out[:, 5] - plain[:, 5]).abs().max() > 1e-3


# Generation

GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3},
    "samples": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
}


def generated(model: CoCoMixForCausalLM, ids: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
    torch.manual_seed(5)
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, pad_token_id=0, **settings)
    return out[:, ids.shape[1] :]


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = [torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows]
    masks = [torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows]
    return torch.stack(ids), torch.stack(masks)


@pytest.mark.parametrize("settings", GENERATIONS.values(), ids=GENERATIONS)
@pytest.mark.parametrize(("kind", "mixing"), [("gpt2", "interleave"), ("llama", "interleave"), ("llama", "add")])
def test_generation_with_the_cache_equals_generation_without(kind, mixing, settings, random_model):
    model = random_model(kind, mixing=mixing)
    late = Steering.add({9: 60.0}, positions="generated")
    for steering in (SEVERAL, [SEVERAL, late]):
        found = generated(model, IDS, steering=steering, **settings)
        assert torch.equal(found, generated(model, IDS, steering=steering, use_cache=False, **settings))
        assert not torch.equal(found, generated(model, IDS, **settings))


@torch.no_grad()
def test_greedy_text_is_the_largest_logit_of_a_full_steered_pass(random_model):
    model, text = random_model("llama"), IDS
    for _ in range(6):
        logits = model(text, steering=SEVERAL, use_cache=False).logits
        text = torch.cat((text, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated(model, IDS, steering=SEVERAL, do_sample=False), text[:, 9:])


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", KINDS)
def test_left_padded_rows_with_steering_of_their_own_equal_single_runs(kind, beams, random_model):
    model = random_model(kind)
    rows = [torch.randint(1, 53, (length,)) for length in (9, 4, 6)]
    own = [SEVERAL, None, Steering.scale({4: -8.0}, positions="generated") + Steering.set({1: 9.0}, positions=[0, 5])]
    together = generated(model, *left_padded(rows), steering=own, num_beams=beams, do_sample=False)
    for row, steering, found in zip(rows, own, together, strict=True):
        alone = generated(model, row[None], steering=steering, num_beams=beams, do_sample=False)
        assert torch.equal(found, alone[0])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_steered_prediction(side, random_model):
    model = random_model()
    rows = [torch.randint(1, 53, (length,)) for length in (9, 4)]
    ids, mask = left_padded(rows)
    if side == "right":
        ids, mask = torch.stack([ids[0], ids[1].roll(-5)]), torch.stack([mask[0], mask[1].roll(-5)])
    out = model(ids, attention_mask=mask, steering=SEVERAL).logits
    for row, alone in enumerate(rows):
        assert_equal(out[row, mask[row].bool()], model(alone[None], steering=SEVERAL).logits[0])


@torch.no_grad()
def test_generated_positions_begin_after_each_prompt(random_model):
    model = random_model()
    mixed = Mixed(model)
    ids, mask = left_padded([torch.randint(1, 53, (length,)) for length in (5, 3)])
    generated(model, ids, mask, steering=Steering.set({7: 99.0}, positions="generated"), do_sample=False)
    prompt, *later = mixed.passes
    assert not (prompt.active.values == 99.0).any()
    assert len(later) == 5 and all((step.active.values == 99.0).sum() == 2 for step in later)


@torch.no_grad()
def test_generated_positions_begin_after_a_prompt_in_any_form(random_model):
    model, late = random_model(), Steering.add({9: 60.0}, positions="generated")
    expected = generated(model, IDS, steering=late, do_sample=False)
    assert not torch.equal(expected, generated(model, IDS, do_sample=False))
    embedded = model.get_input_embeddings()(IDS)
    mask = torch.ones_like(IDS)
    settings = {"attention_mask": mask, "steering": late, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(inputs_embeds=embedded, **settings), expected)
    cache = model(IDS[:, :4], use_cache=True).past_key_values
    assert torch.equal(model.generate(IDS[:, 4:], past_key_values=cache, **settings)[:, 5:], expected)


def test_an_assistant_is_not_steered(random_model, random_teacher):
    model, steering = random_model(), Steering.add({30: 60.0})
    expected = generated(model, IDS[:1], steering=steering, do_sample=False)
    for assistant in (random_teacher("gpt2"), random_model(num_concepts=6)):
        found = generated(model, IDS[:1], steering=steering, do_sample=False, assistant_model=assistant)
        assert torch.equal(found, expected)


def test_a_compiled_model_is_steered_too(random_model):
    model = random_model()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain, steered = model(IDS, use_cache=False).logits, model(IDS, steering={3: 9.0}, use_cache=False).logits
        assert_equal(compiled(IDS, use_cache=False).logits, plain)
        assert_equal(compiled(IDS, steering={3: 9.0}, use_cache=False).logits, steered)
        assert_equal(compiled(IDS, use_cache=False).logits, plain)


def test_gradients_flow_through_a_steered_pass(random_model):
    model = random_model()
    model(IDS, labels=IDS, steering=SEVERAL).loss.backward()
    assert model.mixer.predict.weight.grad[3].abs().max() > 0


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Steering.add({3: float("nan")}),
            "concept 3 is to be steered by nan; expected a number from -10000",
        ),
        (lambda: Steering.scale({3: float("inf")}), "steered by inf"),
        (lambda: Steering.set({3: 1e300}), r"steered by 1e\+300"),
        (lambda: Steering.add({3: "much"}), "steered by 'much'"),
        (lambda: Steering.add({-1: 2.0}), "concept -1 is negative"),
        (lambda: Steering.add({"river": 2.0}), "a concept to steer is 'river'; expected a whole number"),
        (lambda: Steering.suppress([True]), "a concept to steer is True"),
        (lambda: Operation("double", 3), "steering operation 'double'; expected one of add, scale"),
        (lambda: Steering.add({3: 1.0}, positions="last"), "positions are 'last'; expected 'all'"),
        (lambda: Steering.add({3: 1.0}, positions=[-1]), "position -1 is negative"),
        (lambda: Steering.add({3: 1.0}, positions=slice(-3, None)), "position -3 is negative"),
        (lambda: Steering.add({3: 1.0}, positions=slice(0, -1)), "without a step, counted from 0"),
        (lambda: Steering.add({3: 1.0}, positions=slice(0, None, 2)), "without a step"),
        (lambda: Steering.add({3: 1.0}, positions=range(10**20, 10**21)), "a position is 10{20}"),
        (lambda: Steering.add({3: 1.0}, positions=5), "positions are 5; expected numbers in a list"),
        (lambda: Steering.add({3: 1.0}, positions=[0.5]), "a position is 0.5"),
    ],
)
def test_operations_that_make_no_sense(make: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ({40: 1.0}, "no concept 40 to steer: this model has 0 to 39"),
        (7, "steering is of type int; expected"),
        ("3=+4", "steering is of type str; expected"),
        ([{3: 1.0}], "steering has 1 entries for"),
        ([{3: 1.0}, {40: 0.0}], "no concept 40"),
    ],
    ids=str,
)
def test_steering_that_does_not_fit_the_model(steering, message, random_model):
    model = random_model()
    with pytest.raises(ValueError, match=message):
        model(IDS, steering=steering)
    with pytest.raises(ValueError, match=message):
        generated(model, IDS, steering=steering)


def test_a_forward_pass_knows_no_prompt(random_model):
    with pytest.raises(ValueError, match="'generated', which only generate\\(\\) knows"):
        random_model()(IDS, steering=Steering.add({3: 1.0}, positions="generated"))


def test_labels_and_steering_are_refused_together(random_model):
    with pytest.raises(ValueError, match="leave out steering or them"):
        random_model()(IDS, steering={3: 1.0}, concept_ids=torch.zeros(2, 9, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"mixing": "none"}, "nothing"),
        ({"content": "pause"}, "pause"),
        ({"content": "hidden_states", "teacher_hidden_size": 8}, "hidden_states"),
    ],
)
def test_a_model_that_mixes_in_no_concepts_has_nothing_to_steer(settings, what, random_model):
    model = random_model(**settings)
    for call in (lambda: model(IDS, steering={3: 1.0}), lambda: generated(model, IDS, steering={3: 1.0})):
        with pytest.raises(ValueError, match=f"this model mixes in {what}, and no concepts; leave it out"):
            call()
