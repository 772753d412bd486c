"""Losses by document."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from cocomix.data.documents import DocumentTokens
from cocomix.training.documents import document_losses
from cocomix.training.validation import evaluate_model


def test_every_predicted_token_counts_for_its_document(random_teacher) -> None:
    """Against a loop over tokens; the sums are those of the whole evaluation."""
    model = random_teacher("gpt2")
    ids = np.random.default_rng(0).integers(0, 53, size=(5, 12))
    blocks = Dataset.from_dict({"input_ids": ids.tolist()})
    from datasets import List, Value

    blocks = blocks.cast_column("input_ids", List(Value("uint8"), length=12))
    lengths = np.array([7, 1, 20, 2, 30, 3])  # the last one lies behind the last whole block
    documents = DocumentTokens(blocks, lengths)
    found = document_losses(model, blocks, documents, 2, "fp32")
    nll, tokens = np.zeros(6), np.zeros(6)
    with torch.no_grad():
        for block in range(5):
            row = torch.from_numpy(ids[block])[None]
            log_p = F.log_softmax(model(row).logits[0], -1)
            for t in range(1, 12):
                number = int(np.searchsorted(lengths.cumsum(), block * 12 + t, side="right"))
                nll[number] -= log_p[t - 1, ids[block, t]].item()
                tokens[number] += 1
    assert found.tokens.tolist() == tokens.tolist()
    assert found.tokens[-1] == 0
    assert found.nll == pytest.approx(nll)
    whole = evaluate_model(model, blocks, 2)["loss"]
    assert found.nll.sum() / found.tokens.sum() == pytest.approx(whole)
    by_block = document_losses(model, blocks, None, 3, "fp32")
    assert by_block.tokens.tolist() == [11] * 5
    assert by_block.nll.sum() == pytest.approx(nll.sum())
