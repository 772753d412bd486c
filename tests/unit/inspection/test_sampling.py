"""Sampling by noise."""

from __future__ import annotations

import torch

from cocomix.inspection.sampling import GumbelSampling


def test_the_noise_samples_from_the_softmax():
    logits = torch.tensor([[2.0, 0.5, -1.0, 0.0]], dtype=torch.float64)
    sampling = GumbelSampling(temperature=0.7, top_p=1.0, seed=0)
    draws = torch.tensor([int(sampling(torch.zeros(1, 1, dtype=torch.long), logits).argmax()) for _ in range(4000)])
    shares = draws.bincount(minlength=4) / len(draws)
    assert (shares - (logits[0] / 0.7).softmax(-1)).abs().max() < 0.025


def test_top_p_leaves_out_the_rest():
    logits = torch.tensor([[5.0, 1.0, 0.0]], dtype=torch.float64)
    sampling = GumbelSampling(temperature=1.0, top_p=0.5, seed=0)
    assert all(int(sampling(torch.zeros(1, 1, dtype=torch.long), logits).argmax()) == 0 for _ in range(200))
