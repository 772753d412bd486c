"""Tools that quantize, export and look into models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset

import cocomix

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


@pytest.mark.compat("sae-lens", "its trainer on a student's residual stream; the SAE labels text")
@MIXINGS
def test_sae_lens(mixing, student, ids, tokenizer, tmp_path: Path) -> None:
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )
    from sae_lens.load_model import HookedProxyLM

    model = student(mixing=mixing)
    proxy = HookedProxyLM(model, tokenizer)
    with torch.no_grad():
        logits, cache = proxy.run_with_cache(ids, names_filter=["lower.layers.0", "mixer", "upper.layers.1"])
        assert torch.equal(logits, model(ids).logits)
    slots = 2 if mixing == "interleave" else 1
    assert cache["mixer"].shape == cache["upper.layers.1"].shape == (1, slots * 10, 32)
    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=32, d_sae=64, k=4),
        model_name="student",
        hook_name="lower.layers.0",
        dataset_path="given",
        is_dataset_tokenized=True,
        streaming=False,
        context_size=16,
        training_tokens=1024,
        train_batch_size_tokens=128,
        store_batch_size_prompts=4,
        n_batches_in_buffer=16,
        device="cpu",
        n_checkpoints=0,
        checkpoint_path=str(tmp_path / "checkpoints"),
        output_path=str(tmp_path / "sae"),
        logger=LoggingConfig(log_to_wandb=False),
    )
    text = Dataset.from_dict({"input_ids": torch.randint(1, 53, (128, 16)).tolist()})
    LanguageModelSAETrainingRunner(config, override_dataset=text, override_model=proxy).run()
    sae = cocomix.load_sae(tmp_path / "sae")
    latents = sae.encode(cache["lower.layers.0"].flatten(0, 1))
    assert sae.d_sae == 64 and latents.indices.shape == (10, 4)
