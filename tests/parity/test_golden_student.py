"""The student computes what the published code computed: outputs, gradients, greedy text, training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import cocomix
from cocomix.models import mixer
from reference_files import GoldenSet


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def load(state: dict[str, Tensor] | Path, settings: dict) -> cocomix.CoCoMixForCausalLM:
    return cocomix.load_reference_checkpoint(
        state,
        num_attention_heads=settings["n_head"],
        insert_layer=settings["insert_layer_idx"],
        num_active_concepts=settings["concept_num"],
    )


def in_our_names(tensors: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    """Tensors in the reference's names and layout, such as gradients, as ours; the tied head counts once."""
    tied = {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}
    return dict(load(tied, settings).named_parameters())


@dataclass
class Tolerances:
    logits: float
    loss: float
    gradient: float


TOLERANCES = {torch.float32: Tolerances(2e-5, 2e-6, 1e-5), torch.float64: Tolerances(1e-9, 1e-10, 1e-10)}
ROUNDED = Tolerances(5e-7, 1e-10, 1e-7)  # of values of the float64 run rounded to float32: 1e-7 of the largest


class Case:
    """A golden case, and our forward and backward pass over it."""

    def __init__(self, golden: GoldenSet, name: str, dtype: torch.dtype) -> None:
        self.expected = golden.expected(name, dtype)
        self.settings = golden.record(name)["config"]
        self.tolerances = ROUNDED if golden.rounded and dtype == torch.float64 else TOLERANCES[dtype]
        self.state = {key: value.to(dtype) for key, value in part(golden.tensors(name), "param/").items()}
        self.input_ids = self.expected["io/input_ids"]
        self.model = load(self.state, self.settings)

    def run(self) -> cocomix.CoCoMixOutput:
        return self.model(
            self.input_ids,
            labels=self.input_ids,
            concept_ids=self.expected["io/concept_labels"],
            output_concepts=True,
        )


CASES = [
    f"{student}-{dtype}"
    for student in ("own-student_a", "larger-student_a", "larger-student_b")
    for dtype in ("float32", "float64")
]


@pytest.fixture(params=CASES)
def case(request) -> Case:
    which, name, dtype = request.param.split("-")
    return Case(GoldenSet.named(which), name, getattr(torch, dtype))


def assert_close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_logits_equal_the_published_ones(case):
    out = case.run()
    assert_close(out.logits, case.expected["out/logits"], case.tolerances.logits)
    assert_close(out.concept_logits, case.expected["out/concept_logit"], case.tolerances.logits)


def test_losses_equal_the_published_ones(case):
    out = case.run()
    assert case.model.config.concept_loss_weight == case.settings["lam"]
    assert_close(out.token_loss, case.expected["out/loss_ntp"], case.tolerances.loss)
    assert_close(out.concept_loss, case.expected["out/loss_concept"], case.tolerances.loss)
    assert_close(out.loss, case.expected["out/loss_total"], case.tolerances.loss)


def test_every_gradient_equals_the_published_one(case, relative_error):
    case.run().loss.backward()
    expected = in_our_names(part(case.expected, "grad/"), case.settings)
    found = {key: weight.grad for key, weight in case.model.named_parameters()}
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert relative_error(gradient, expected[key]) < case.tolerances.gradient, key


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("larger")], indirect=True)
def test_every_step_inside_the_model_equals_the_published_one(case, monkeypatch, relative_error):
    seen: dict[str, Tensor] = {}
    compress = mixer.compress

    def watched_compress(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        dense = values.new_zeros(*values.shape[:-1], weight.shape[0])
        seen["concept_act"] = dense.scatter(-1, indices, values)
        mixed = compress(values, indices, weight)
        seen["compress_out"] = mixed + case.model.mixer.compress_bias
        return mixed

    monkeypatch.setattr(mixer, "compress", watched_compress)
    model = case.model
    model.mixer.predict.register_forward_pre_hook(lambda _, args: seen.update(concept_in=args[0]))
    model.mixer.register_forward_hook(lambda _, args, out: seen.update(interleaved=out.hidden_states))
    model.upper.ln_f.register_forward_hook(
        lambda _, args, out: seen.update(ln_f_in=args[0][:, 1::2], ln_f_out=out[:, 1::2])
    )
    case.run()
    expected = part(case.expected, "mid/")
    assert seen.keys() == expected.keys()
    for key, tensor in seen.items():
        assert relative_error(tensor, expected[key]) < case.tolerances.gradient, key
    assert torch.equal(seen["concept_act"] != 0, expected["concept_act"] != 0)


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_a_checkpoint_file_loads_like_its_state_dict(form, case, tmp_path):
    path = tmp_path / f"checkpoint.{form}"
    if form == "pt":
        torch.save(case.state, path)
    else:
        save_file(case.state, path)
    from_file = load(path, case.settings)
    assert torch.equal(from_file(case.input_ids).logits, case.model(case.input_ids).logits)


@pytest.mark.parametrize("use_cache", [False, True], ids=["recomputed", "cached"])
@pytest.mark.parametrize("prompt", ["p12", "p24"])
def test_greedy_text_equals_the_published_one(prompt, use_cache, golden):
    model = Case(golden, "student_a", torch.float32).model
    expected = part(golden.tensors("greedy_a"), f"{prompt}/")
    ids = expected["prompt"]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=16,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences[:, ids.shape[1] :], expected["continuation"])
    if not golden.rounded:
        assert_close(torch.stack(out.logits, dim=1), expected["step_logits"], 2e-5)


@pytest.fixture(scope="module")
def trained(golden) -> tuple[cocomix.CoCoMixForCausalLM, list[dict[str, float]], list[dict[str, float]]]:
    """Six steps of training: the model after them, what each step gave, and what it had to give."""
    record = golden.record("trajectory_a")
    batches = golden.tensors("trajectory_a")
    hparams = record["hparams"]
    model = Case(golden, "student_a", torch.float32).model
    optimizer = torch.optim.AdamW(
        model.parameters(),
        betas=(hparams["beta1"], hparams["beta2"]),
        eps=hparams["eps"],
        weight_decay=hparams["weight_decay"],
    )
    steps = []
    for expected in record["steps"]:
        batch = part(batches, f"step{expected['step']}/")
        optimizer.param_groups[0]["lr"] = expected["lr"]
        out = model(batch["input_ids"], labels=batch["input_ids"], concept_ids=batch["concept_labels"])
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), hparams["grad_clip_thresh"])
        optimizer.step()
        optimizer.zero_grad()
        found = {"loss": out.token_loss, "loss_concept": out.concept_loss, "grad_norm": norm}
        steps.append({key: value.item() for key, value in found.items()})
    return model, steps, record["steps"]


def test_training_gives_the_published_losses_and_gradient_norms(trained):
    _, found, expected = trained
    assert len(found) == 6
    for step, wanted in zip(found, expected, strict=True):
        for key, value in step.items():
            assert value == pytest.approx(wanted[key], abs=1e-5), (wanted["step"], key)


@pytest.mark.parametrize("golden", ["larger"], indirect=True)
def test_training_ends_at_the_published_weights(trained, golden):
    model, _, _ = trained
    settings = golden.record("trajectory_a")["config"]
    expected = in_our_names(part(golden.tensors("trajectory_a"), "final/"), settings)
    width = settings["n_embd"]
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for key, weight in found.items():
        difference = (weight - expected[key]).abs()
        if key.endswith("c_attn.bias"):  # the gradient of a key bias is 0, Adam makes steps of its rounding
            assert difference[width : 2 * width].max() < 2e-3, key
            difference[width : 2 * width] = 0
        assert difference.max() < 1e-5, key
