"""What is no SAE, or one that cannot serve, is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cocomix import InputError
from cocomix.concepts import sae as sae_module
from cocomix.concepts.sae import SparseAutoencoder, load_sae

D_IN, D_SAE, K = 8, 20, 4


def weights() -> dict[str, torch.Tensor]:
    return {
        "W_enc": torch.randn(D_IN, D_SAE),
        "b_enc": torch.randn(D_SAE),
        "W_dec": torch.randn(D_SAE, D_IN),
        "b_dec": torch.randn(D_IN),
    }


def saelens_folder(folder: Path, **changes: object) -> Path:
    save_file(weights(), folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"architecture": "topk", "k": K, **changes}))
    return folder


def openai_state() -> dict[str, object]:
    w = weights()
    return {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "decoder.weight": w["W_dec"].T.contiguous(),
        "latent_bias": w["b_enc"],
        "pre_bias": w["b_dec"],
        "activation": "TopK",
        "activation_state_dict": {"k": K},
    }


def refused(source: Path | str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_sae(source)
    assert "\n" not in str(caught.value)


def test_a_path_with_nothing_there_is_refused(tmp_path):
    refused(tmp_path / "none.pt", "no SAE at '.*none.pt': expected a SAELens folder")


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    refused(tmp_path, "no SAE at .*: expected a SAELens folder")


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", None])
def test_another_architecture_is_refused(architecture, tmp_path):
    folder = saelens_folder(tmp_path, architecture=architecture)
    refused(folder, f"is of architecture {architecture!r}; expected 'topk'")


def test_a_normalisation_that_is_not_known_here_is_refused(tmp_path):
    folder = saelens_folder(tmp_path, normalize_activations="constant_norm_rescale")
    refused(folder, "normalises its input by 'constant_norm_rescale'; expected 'none' or 'layer_norm'")


def corrupt(path: Path, kind: str) -> Path:
    if kind == "text":
        path.write_text("this is not a tensor")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut short":
        torch.save(openai_state(), path)
        path.write_bytes(path.read_bytes()[:700])
    elif kind == "a list":
        torch.save([1, 2, 3], path)
    else:  # a checkpoint of something else
        torch.save({"model.weight": torch.zeros(3)}, path)
    return path


@pytest.mark.parametrize("kind", ["text", "empty", "cut short", "a list", "a checkpoint of something else"])
def test_a_corrupt_pt_file_is_refused(kind, tmp_path):
    refused(corrupt(tmp_path / "sae.pt", kind), r"sae.pt is not an SAE in OpenAI's format: \w+")


def test_an_openai_sae_of_another_activation_is_refused(tmp_path):
    torch.save({**openai_state(), "activation": "ReLU"}, tmp_path / "sae.pt")
    refused(tmp_path / "sae.pt", "has the activation 'ReLU'; expected 'TopK'")


def test_an_openai_sae_without_k_is_refused(tmp_path):
    torch.save({**openai_state(), "activation_state_dict": {}}, tmp_path / "sae.pt")
    refused(tmp_path / "sae.pt", "sae.pt")


def incomplete(folder: Path, lacking: str) -> Path:
    saelens_folder(folder)
    weights_file, config_file = folder / "sae_weights.safetensors", folder / "cfg.json"
    if lacking == "k":
        config_file.write_text(json.dumps({"architecture": "topk"}))
    elif lacking == "a readable cfg.json":
        config_file.write_text("{")
    elif lacking == "its weights":
        weights_file.unlink()
    elif lacking == "readable weights":
        weights_file.write_bytes(b"nothing")
    else:  # W_dec
        save_file({"W_enc": torch.zeros(D_IN, D_SAE)}, weights_file)
    return folder


@pytest.mark.parametrize("lacking", ["k", "a readable cfg.json", "its weights", "readable weights", "W_dec"])
def test_an_incomplete_saelens_folder_is_refused(lacking, tmp_path):
    refused(incomplete(tmp_path, lacking), str(tmp_path))


def test_an_openai_sae_gives_its_sizes(tmp_path):
    torch.save(openai_state(), tmp_path / "sae.pt")
    sae = load_sae(str(tmp_path / "sae.pt"))
    assert (sae.d_in, sae.d_sae, sae.k, sae.layer_norm, sae.subtract_b_dec) == (D_IN, D_SAE, K, True, True)


def test_latents_are_at_most_k_and_never_negative():
    sae = SparseAutoencoder(**weights(), k=K)
    latents = sae.encode(torch.randn(3, 5, D_IN))
    assert latents.values.shape == latents.indices.shape == (3, 5, K)
    assert latents.values.min() >= 0
    assert latents.indices.dtype == torch.int64


def test_encoding_builds_no_graph():
    sae = SparseAutoencoder(**weights(), k=K)
    assert list(sae.parameters()) == []
    assert not sae.encode(torch.randn(3, D_IN, requires_grad=True)).values.requires_grad


@pytest.mark.parametrize("rows_per_chunk", [1, 3])
def test_encoding_in_chunks_equals_encoding_at_once(rows_per_chunk, monkeypatch):
    sae, x = SparseAutoencoder(**weights(), k=K, layer_norm=True).double(), torch.randn(2, 7, D_IN).double()
    whole = sae.encode(x)
    chunks: list[int] = []
    addmm = torch.addmm
    monkeypatch.setattr(
        sae_module.torch, "addmm", lambda bias, part, W: (chunks.append(len(part)), addmm(bias, part, W))[1]
    )
    monkeypatch.setattr(sae_module, "ENCODE_BUFFER_BYTES", rows_per_chunk * D_SAE * 8)
    found = sae.encode(x)
    assert len(chunks) == -(-14 // rows_per_chunk)
    assert max(chunks) == rows_per_chunk
    assert torch.equal(found.indices, whole.indices)
    torch.testing.assert_close(found.values, whole.values, rtol=1e-12, atol=1e-12)


def test_a_buffer_smaller_than_one_row_still_encodes(monkeypatch):
    sae, x = SparseAutoencoder(**weights(), k=K), torch.randn(3, D_IN)
    whole = sae.encode(x)
    monkeypatch.setattr(sae_module, "ENCODE_BUFFER_BYTES", 1)
    assert torch.equal(sae.encode(x).indices, whole.indices)


def test_an_sae_encodes_in_the_precision_of_its_weights():
    sae = SparseAutoencoder(**weights(), k=K)
    x = torch.randn(3, D_IN)
    assert sae.encode(x.bfloat16()).values.dtype == torch.float32
    assert sae.reconstruct(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(sae.encode(x.bfloat16()).values, sae.encode(x.bfloat16().float()).values)
