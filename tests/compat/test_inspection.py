"""Tools that quantize, export and look into models."""

from __future__ import annotations

import pytest
import torch

MIXINGS = pytest.mark.parametrize("mixing", ["add", "interleave"])


@pytest.mark.compat("torchao", "int8 weights (quantize_)")
@MIXINGS
@torch.no_grad()
def test_torchao(mixing, student, ids, relative_error) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = student(mixing=mixing)
    expected = model(ids).logits
    quantize_(model, Int8WeightOnlyConfig())
    assert 0 < relative_error(model(ids).logits, expected) < 0.05
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4).shape == (1, 14)


@pytest.mark.compat("torch", "torch.export, of any length")
@MIXINGS
@torch.no_grad()
def test_export(mixing, student, ids) -> None:
    model = student(mixing=mixing)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, use_cache=False).logits

    exported = torch.export.export(Logits(), (ids,), dynamic_shapes=({1: torch.export.Dim("tokens", min=2, max=60)},))
    for text in (ids, ids[:, :6]):
        torch.testing.assert_close(exported.module()(text), model(text, use_cache=False).logits)


@pytest.mark.compat("nnsight", "trace of lower blocks, mixer, upper blocks; an intervention on concept logits")
@MIXINGS
def test_nnsight(mixing, student, ids, tokenizer) -> None:
    from nnsight import LanguageModel

    model = student(mixing=mixing)
    wrapped, found = LanguageModel(model, tokenizer=tokenizer), {}
    with torch.no_grad(), wrapped.trace(ids):
        found["lower"] = wrapped.lower.layers[0].output.save()
        found["predicted"] = wrapped.mixer.predict.output.save()
        found["upper"] = wrapped.upper.layers[0].output.save()
    slots = 2 if mixing == "interleave" else 1
    assert found["predicted"].shape == (1, 10, 40)
    with torch.no_grad():
        expected = model(ids, steering={3: 9.0}).logits
        with wrapped.trace(ids):
            wrapped.mixer.predict.output[..., 3] += 9.0
            logits = wrapped.lm_head.output.save()
    torch.testing.assert_close(logits, expected)
    assert slots * 10 in found["upper"].shape


@pytest.mark.compat("sae-lens", "activations of the residual stream through hooks, for training an SAE")
@MIXINGS
@torch.no_grad()
def test_sae_lens(mixing, student, ids, tokenizer) -> None:
    from sae_lens.load_model import HookedProxyLM

    model = student(mixing=mixing)
    expected = model(ids)
    proxy = HookedProxyLM(model, tokenizer)
    logits, cache = proxy.run_with_cache(ids, names_filter=["lower.layers.0", "mixer", "upper.layers.1"])
    assert torch.equal(logits, expected.logits)
    slots = 2 if mixing == "interleave" else 1
    assert cache["lower.layers.0"].shape == (1, 10, 32)
    assert cache["mixer"].shape == cache["upper.layers.1"].shape == (1, slots * 10, 32)
