"""Concepts that a model mixes in alike."""

from __future__ import annotations

import pytest
import torch

from cocomix.inspection.similar import similar_concepts


def test_concepts_are_ranked_by_the_angle_between_what_they_mix_in(random_model):
    model = random_model(num_concepts=6)
    rows = model.mixer.compress_weight
    with torch.no_grad():
        rows.zero_()
        rows[0, 0], rows[1, 0], rows[3, 0] = 2.0, 5.0, -1.0
        rows[2, :2] = 1.0
    found = similar_concepts(model, 0, 3)
    assert [each.concept_id for each in found][:2] == [1, 2]
    assert [each.cosine for each in found] == pytest.approx([1.0, 0.5**0.5, 0.0])
    assert [each.concept_id for each in similar_concepts(model, 0, 9)][-1] == 3
