"""The continuous vector taken away or exchanged, against the same by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, List, Value
from torch import Tensor

from cocomix.evaluation.channel import changed, channel_losses, zeroed
from cocomix.models.mixer import compress, interleave, moments

BLOCKS, LENGTH = 6, 10


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 53, (BLOCKS, LENGTH))


def blocks_of(ids: Tensor) -> Dataset:
    features = Features({"input_ids": List(Value("int32"), length=LENGTH)})
    return Dataset.from_dict({"input_ids": ids.tolist()}, features=features)


def loss_by_hand(model, ids: Tensor, exchange) -> float:
    """Lower blocks, mixer and upper blocks one after the other, the vectors exchanged in between."""
    h = model.lower(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state
    of_h, mixer = moments(h), model.mixer
    z = mixer.predict((h - of_h.mean) / (of_h.std + 1e-5) - mixer.pre_bias)
    values, indices = z.topk(5, dim=-1)
    mixed = compress(values, indices, mixer.compress_weight)
    c = exchange((mixed + mixer.compress_bias + mixer.pre_bias) * of_h.std + of_h.mean)
    residual = model.config.concept_slot == "residual"
    if model.config.mixing == "add":
        h = model.upper(inputs_embeds=h + (c - of_h.mean if residual else c), use_cache=False).last_hidden_state
    else:
        slots = interleave(h, c + h - of_h.mean if residual else c)
        h = model.upper(inputs_embeds=slots, use_cache=False).last_hidden_state[:, 1::2]
    logits = model.lm_head(h)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


@pytest.mark.parametrize("mixing", ["interleave", "add"])
@pytest.mark.parametrize("slot", ["concept", "residual"])
@torch.no_grad()
def test_losses_against_the_vectors_exchanged_by_hand(random_model, ids: Tensor, mixing: str, slot: str) -> None:
    model = random_model(mixing=mixing, concept_slot=slot)
    found = channel_losses(model, blocks_of(ids), batch_size=4)
    where = [(position - LENGTH // 2) % LENGTH for position in range(LENGTH)]
    rows = [3, 4, 5, 0, 1, 2]  # half of the blocks away
    expected = {
        "own": lambda c: c,
        "zeroed": lambda c: 0 * c,
        "of another position": lambda c: c[:, where],
        "of another text": lambda c: c[rows],
    }
    assert list(found) == list(expected)
    for name, exchange in expected.items():
        assert found[name] == pytest.approx(loss_by_hand(model, ids, exchange), rel=1e-6), name
    assert len({round(loss, 6) for loss in found.values()}) == 4


def test_hidden_states_that_are_mixed_in_are_exchanged_too(random_model, ids: Tensor) -> None:
    model = random_model(content="hidden_states", teacher_hidden_size=24)
    assert len(set(channel_losses(model, blocks_of(ids), batch_size=3).values())) == 4


@torch.no_grad()
def test_the_change_is_undone_whatever_happens(random_model, ids: Tensor) -> None:
    model = random_model()
    before = model(ids).logits
    with pytest.raises(KeyboardInterrupt), changed(model.mixer, zeroed):
        assert not torch.equal(model(ids).logits, before)
        raise KeyboardInterrupt
    assert torch.equal(model(ids).logits, before)
    assert "predict_and_compress" not in vars(model.mixer)


@torch.no_grad()
def test_every_text_has_a_partner_in_batches_of_any_size(random_model, ids: Tensor) -> None:
    model = random_model()
    four = channel_losses(model, blocks_of(ids[:4]), batch_size=4)
    for batch_size in (1, 2, 3, 100):
        assert channel_losses(model, blocks_of(ids[:5]), batch_size=batch_size) == pytest.approx(four, rel=1e-5)


@torch.no_grad()
def test_a_pause_vector_is_the_same_everywhere(random_model, ids: Tensor) -> None:
    found = channel_losses(random_model(content="pause"), blocks_of(ids), batch_size=2)
    assert found["own"] == found["of another position"] == found["of another text"] != found["zeroed"]
