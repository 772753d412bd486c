"""A trace says what the model does: every figure against another way to get it."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import Any

import pytest
import torch

import cocomix
from cocomix import CoCoMixForCausalLM, InputError, Steering, Trace
from cocomix.inspection.trace import Comparison, TracedConcept

FORMS = {
    "interleave": {},
    "residual": {"concept_slot": "residual"},
    "add": {"mixing": "add"},
    "add-residual": {"mixing": "add", "concept_slot": "residual"},
    "repeat": {"slot_positions": "repeat"},
    "bottom": {"insert_layer": 0},
}
TEXT = "5 17 3 42 8 29"


class Numbers:
    """A tokenizer whose tokens are numbers."""

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int], **_options: Any) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(params=[("gpt2", name) for name in FORMS] + [("llama", name) for name in FORMS], ids="-".join)
def model(request, random_model) -> CoCoMixForCausalLM:
    kind, name = request.param
    return random_model(kind, **FORMS[name])


def traced(model: CoCoMixForCausalLM, text: str = TEXT, **options: Any) -> Trace:
    return cocomix.trace(model, Numbers(), text, **options)


def ids_of(text: str = TEXT) -> torch.Tensor:
    return torch.tensor([list(map(int, text.split()))])


@torch.no_grad()
def logprob(model: CoCoMixForCausalLM, at: int, target: int, **options: Any) -> float:
    return model(ids_of(), use_cache=False, **options).logits[0, at].log_softmax(-1)[target].item()


def test_the_parts_sum_to_the_continuous_vector(model):
    trace = traced(model, ablate=0)
    assert trace.verify() < 1e-13
    # And that is what the upper blocks are given, in whatever form it is mixed in.
    seen: list[Any] = []
    model.mixer.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0][0], output)))
    model(ids_of())
    h, output = seen[0][0], seen[0][1].hidden_states[0]
    mixture, residual, slots = trace.mixture, model.config.concept_slot == "residual", model.config.slots_per_token
    for at in range(6):
        v = mixture.parts(at).sum(0) + mixture.bias_part(at)
        carried = h[at] if residual else mixture.mean[at] + (h[at] if model.config.mixing == "add" else 0)
        torch.testing.assert_close(output[slots - 1 :: slots][at], v + carried)


def test_a_trace_prints_the_strongest_concept_of_each_token(model):
    trace = traced(model, ablate=0)
    lines = repr(trace).splitlines()
    assert lines[0] == f"Trace of {len(trace.tokens)} tokens" and len(lines) == 1 + len(trace.tokens)
    assert f"concept {trace.tokens[2].concepts[0].concept_id}" in lines[3]


def test_concepts_are_those_that_the_model_mixes(random_model):
    model = random_model()
    trace = traced(model, names={3: "three"})
    with torch.no_grad():
        z = model(ids_of(), output_concepts=True).concept_logits[0]
    for token, token_logits in zip(trace.tokens, z, strict=True):
        largest = token_logits.topk(5)
        assert [concept.concept_id for concept in token.concepts] == largest.indices.tolist()
        assert [concept.logit for concept in token.concepts] == pytest.approx(largest.values.tolist())
        expected = token_logits.softmax(-1)[largest.indices].tolist()
        assert [concept.probability for concept in token.concepts] == pytest.approx(expected)
        assert {concept.name for concept in token.concepts} <= {None, "three"}


def test_shares_sum_to_one_and_are_projections(random_model):
    trace = traced(random_model("llama"), ablate=0)
    for token in trace.tokens:
        assert sum(concept.share for concept in token.concepts) + token.bias_share == pytest.approx(1)
        parts = trace.mixture.parts(token.position)
        v = trace.mixture.c[token.position] - trace.mixture.mean[token.position]
        for concept, part in zip(token.concepts, parts, strict=True):
            assert concept.share == pytest.approx((part.dot(v) / v.dot(v)).item())
            assert concept.norm == pytest.approx(part.norm().item())


def test_a_vector_of_nothing_has_no_shares(random_model):
    model = random_model()
    for weight in (model.mixer.compress_weight, model.mixer.compress_bias, model.mixer.pre_bias):
        weight.data.zero_()
    (token, *_), comparison = (trace := traced(model)).tokens, trace.comparison
    assert {concept.share for concept in token.concepts} == {0.0} and token.bias_share == 0
    assert dataclasses.replace(comparison, correlation=None, largest_difference=0.0) == Comparison(24, None, None, 0.0)
    assert comparison.largest_difference < 1e-12


def test_the_next_token_is_the_texts_and_at_its_end_the_models_choice(random_model):
    model = random_model()
    trace = traced(model)
    assert [token.token_id for token in trace.tokens] == [5, 17, 3, 42, 8, 29]
    with torch.no_grad():
        choice = model(ids_of()).logits[0, -1].argmax().item()
    assert [token.next_id for token in trace.tokens] == [17, 3, 42, 8, 29, choice]
    assert [token.next_in_text for token in trace.tokens] == [True] * 5 + [False]
    assert trace.tokens[1].text == "17" and trace.tokens[1].next_text == "3"
    for token in trace.tokens:
        assert token.next_logprob == pytest.approx(logprob(model, token.position, token.next_id))


def test_gradient_effects_are_slopes_times_logits(model):
    # Transformers' RMSNorm rounds to float32, which differences must not drown in.
    exact = model.config.backbone_config.model_type == "gpt2"
    step, within = (1e-5, 1e-7) if exact else (3e-3, 2e-3)
    for token in traced(model, ablate=0).tokens[::2]:
        for concept in token.concepts:
            up, down = (
                logprob(
                    model,
                    token.position,
                    token.next_id,
                    steering=Steering.add({concept.concept_id: by}, positions=[token.position], after_choice=True),
                )
                for by in (step, -step)
            )
            slope = (up - down) / (2 * step)
            assert concept.gradient_effect == pytest.approx(concept.logit * slope, rel=1e-4, abs=within)


def test_ablation_effects_are_those_of_taking_the_part_out_of_the_slot(model):
    trace = traced(model, ablate=2)
    slots = model.config.slots_per_token
    for token in trace.tokens[::2]:
        assert [concept.ablation_effect is None for concept in token.concepts] == [False] * 2 + [True] * 3
        for concept, part in zip(token.concepts[:2], trace.mixture.parts(token.position), strict=False):

            def take_out(_module, _args, kwargs, at=token.position, part=part):
                changed = kwargs["inputs_embeds"].clone()
                changed[0, slots * at + slots - 1] -= part
                return (), {**kwargs, "inputs_embeds": changed}

            hook = model.upper.register_forward_pre_hook(take_out, with_kwargs=True)
            without = logprob(model, token.position, token.next_id)
            hook.remove()
            assert concept.ablation_effect == pytest.approx(token.next_logprob - without, abs=1e-9)


@pytest.mark.parametrize("ablate", [0, 5, 99])
def test_so_many_concepts_are_ablated(ablate, random_model):
    trace = traced(random_model(), ablate=ablate)
    for token in trace.tokens:
        assert sum(concept.ablation_effect is not None for concept in token.concepts) == min(ablate, 5)
    assert (trace.comparison is None) == (ablate == 0)


def test_the_comparison_by_hand(random_model):
    trace = traced(random_model(), ablate=0)
    blank = trace.tokens[0].concepts[0]

    def concept(gradient: float, ablation: float | None) -> TracedConcept:
        return dataclasses.replace(blank, gradient_effect=gradient, ablation_effect=ablation)

    concepts = (concept(1.0, 2.0), concept(2.0, 4.0), concept(-1.0, 1.5), concept(0.5, 0.0), concept(9.0, None))
    token = dataclasses.replace(trace.tokens[0], concepts=concepts)
    comparison = dataclasses.replace(trace, tokens=(token,)).comparison
    assert comparison.concepts == 4
    assert comparison.correlation == pytest.approx(3.8125 / (4.6875 * 8.1875) ** 0.5)
    assert comparison.sign_agreement == pytest.approx(2 / 3)
    assert comparison.largest_difference == 2.5


def test_a_sum_that_does_not_come_out_is_an_error(random_model):
    trace = traced(random_model(), ablate=0)
    spoilt = dataclasses.replace(trace, mixture=trace.mixture._replace(values=trace.mixture.values * (1 + 1e-9)))
    with pytest.raises(ArithmeticError, match="the parts do not sum to the continuous vector"):
        spoilt.verify()


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_other_precisions(dtype, within, random_model):
    trace = traced(random_model("llama").to(dtype))
    assert trace.verify() < within
    assert trace.comparison.correlation > 0.5


def test_a_steered_model_is_traced_as_steered(random_model):
    model = random_model()
    steering = Steering.set({7: 30.0}) + Steering.suppress([3])
    trace = traced(model, steering=steering)
    trace.verify()
    for token in trace.tokens:
        first = token.concepts[0]
        assert (first.concept_id, first.logit) == (7, 30.0)
        expected = logprob(model, token.position, token.next_id, steering=steering)
        assert token.next_logprob == pytest.approx(expected)
        without = steering + Steering.set({7: 0.0}, positions=[token.position], after_choice=True)
        expected -= logprob(model, token.position, token.next_id, steering=without)
        assert first.ablation_effect == pytest.approx(expected)


def test_a_trace_leaves_the_model_as_it_was(random_model):
    model = random_model(backbone={"resid_pdrop": 0.5}).train()
    with torch.no_grad():
        once = traced(model)
    assert model.training and once.tokens == traced(model).tokens
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.mixer._forward_hooks
    frozen = traced(model.requires_grad_(False))
    for token, same in zip(once.tokens, frozen.tokens, strict=True):
        effects = [[concept.gradient_effect for concept in each.concepts] for each in (token, same)]
        assert effects[0] == pytest.approx(effects[1])


def test_traces_at_the_same_time_do_not_mix(random_model):
    model = random_model()
    texts = ["1 2 3 4", "9 8 7", "5 6 5 6 5", "11"]
    alone, found = [traced(model, text).to_dict() for text in texts], {}

    def work(text: str) -> None:
        found[text] = [traced(model, text).to_dict() for _ in range(3)]

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[text] for text in texts] == [[trace] * 3 for trace in alone]


def test_it_can_be_written_as_json(random_model):
    found = json.loads(json.dumps(traced(random_model()).to_dict(), allow_nan=False))
    assert len(found["tokens"]) == 6 and found["verified"] < 1e-12
    assert found["comparison"]["concepts"] == 24


@pytest.mark.parametrize(
    ("settings", "text", "options", "message"),
    [
        ({"mixing": "none"}, TEXT, {}, "mixes no concepts in"),
        ({"content": "pause"}, TEXT, {}, "mixes no concepts in"),
        ({}, "", {}, "the text has 0 tokens; this model reads 1 to 64"),
        ({}, "1 " * 65, {}, "the text has 65 tokens"),
        ({}, "5 \ud83d", {}, "not valid Unicode: its character 2 is '.ud83d'"),
        ({}, TEXT, {"ablate": -1}, "ablate is -1"),
        ({}, TEXT, {"steering": {40: 1.0}}, "no concept 40 to steer"),
    ],
    ids=["none", "pause", "empty", "long", "surrogate", "ablate", "concept"],
)
def test_what_cannot_be_traced(settings, text, options, message, random_model):
    with pytest.raises(ValueError, match=message) as caught:
        traced(random_model(**settings), text, **options)
    assert "steer" in message or isinstance(caught.value, InputError)


def test_a_plain_model_is_refused(random_teacher):
    with pytest.raises(InputError, match="give one trained with cocomix"):
        traced(random_teacher())
