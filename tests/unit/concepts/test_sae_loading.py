"""What is no SAE, or one that cannot serve, is refused in one line; what serves stays sparse and small."""

from __future__ import annotations

import json
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cocomix import InputError
from cocomix.concepts import sae as sae_module
from cocomix.concepts.sae import MAX_ACTIVE, SparseAutoencoder
from cocomix.concepts.sae_loading import load_sae

D_IN, D_SAE, K = 8, 20, 4


def weights() -> dict[str, Tensor]:
    return {
        "W_enc": torch.randn(D_IN, D_SAE),
        "b_enc": torch.randn(D_SAE),
        "W_dec": torch.randn(D_SAE, D_IN),
        "b_dec": torch.randn(D_IN),
    }


def saelens_folder(folder: Path, more_weights: dict[str, Tensor] | None = None, **changes: object) -> Path:
    save_file({**weights(), **(more_weights or {})}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"architecture": "topk", "k": K, **changes}))
    return folder


def sparsify_folder(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    w = weights()
    names = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    save_file({**names, "W_dec": w["W_dec"], "b_dec": w["b_dec"]}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"activation": "topk", "k": K, "d_in": D_IN, **changes}))
    return folder


def openai_state() -> dict[str, Any]:
    w = weights()
    return {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "decoder.weight": w["W_dec"].T.contiguous(),
        "latent_bias": w["b_enc"],
        "pre_bias": w["b_dec"],
        "activation": "TopK",
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
    }


def refused(source: Path | str, message: str, **arguments: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_sae(source, **arguments)
    assert "\n" not in str(caught.value)


# Nothing there


def test_a_path_with_nothing_there_is_refused(tmp_path):
    refused(tmp_path / "none.pt", "no SAE at '.*none.pt': expected a SAELens or sparsify folder")


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    refused(tmp_path, "no SAE at .*: expected a SAELens or sparsify folder")


def test_a_folder_of_saes_is_refused_with_their_names(tmp_path):
    for name in ("layers.10", "layers.9", "layers.9.mlp", "layers.2/seed1"):
        sparsify_folder(tmp_path / name)
    refused(tmp_path, "holds several SAEs; give the folder of one: layers.2/seed1, layers.9, layers.9.mlp, layers.10$")


def test_the_list_of_names_ends(tmp_path):
    for number in range(30):
        sparsify_folder(tmp_path / f"h.{number}")
    refused(tmp_path, r": h\.0, .*, h\.23 and 6 more$")


# SAELens folders


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("batchtopk", " .a training checkpoint: .*save_inference_model.*"),
        ("matryoshka_batchtopk", " .a training checkpoint: .*save_inference_model.*"),
        ("skip_transcoder", " .it reads at one site.*"),
        ("jumprelu_transcoder", " .it reads at one site.*"),
        ("abstopk", " .its latents may be negative."),
        ("matching_pursuit", " .it encodes iteratively.*"),
        ("temporal", " .its encoding of a token depends.*"),
        ("crosscoder", ""),
        (None, ""),
    ],
)
def test_another_architecture_is_refused(architecture, reason, tmp_path):
    folder = saelens_folder(tmp_path, architecture=architecture)
    refused(folder, f"is of architecture {architecture!r}{reason}; expected one of standard, topk, jumprelu, gated")


def test_an_old_sae_with_another_activation_is_refused(tmp_path):
    folder = saelens_folder(tmp_path, architecture="standard", activation_fn_str="tanh-relu")
    refused(folder, "architecture 'standard with the activation tanh-relu'")


def test_a_normalization_that_is_not_known_here_is_refused(tmp_path):
    folder = saelens_folder(tmp_path, normalize_activations="covariance_whitening")
    refused(folder, "normalizes its input by 'covariance_whitening'; expected none, ")


def test_an_unfolded_average_is_used_as_saelens_does_and_said(tmp_path):
    with pytest.warns(UserWarning, match="used unscaled, as by SAELens"):
        assert load_sae(saelens_folder(tmp_path, normalize_activations=True)).normalization == "none"


@pytest.mark.parametrize("state", [{"scaling_factor": 0.3}, {"scaling_factor": None, "has_whitening": True}])
def test_a_checkpoint_whose_scaling_lies_beside_it_is_refused(state, tmp_path):
    folder = saelens_folder(tmp_path)
    (folder / "activation_scaler.json").write_text(json.dumps(state))
    refused(folder, "is a training checkpoint whose input scaling is not folded into the weights")


def test_a_checkpoint_that_needs_no_scaling_is_taken(tmp_path):
    folder = saelens_folder(tmp_path)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": None, "has_whitening": False}))
    assert load_sae(folder).k == K


def test_reshaped_activations_are_refused(tmp_path):
    refused(saelens_folder(tmp_path, reshape_activations="hook_z"), "reads hook_z .reshape_activations., within")


def test_a_finetuned_scale_is_refused_unless_it_is_one(tmp_path):
    folder = saelens_folder(tmp_path, {"scaling_factor": torch.full((D_SAE,), 1.5)})
    refused(folder, "has a scaling_factor, which SAELens 6 does not support")
    assert load_sae(saelens_folder(tmp_path, {"scaling_factor": torch.ones(D_SAE)})).k == K


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    folder = saelens_folder(tmp_path, {"W_dec": torch.zeros(D_SAE, D_IN + 1)})
    refused(folder, rf"{folder}: W_dec has the shape \(20, 9\); with W_enc \(8, 20\) it must be \(20, 8\)")


THRESHOLD = {"threshold": torch.ones(D_SAE)}


@pytest.mark.parametrize(
    ("architecture", "extra", "message"),
    [
        (
            "standard",
            THRESHOLD,
            "'standard', has threshold, which would be ignored; expected W_dec, W_enc, b_dec, b_enc",
        ),
        ("topk", THRESHOLD, "'topk', has threshold, which would be ignored"),
        ("standard", {"b_gate": torch.ones(D_SAE)}, "has b_gate, which would be ignored"),
        ("jumprelu", {**THRESHOLD, "log_threshold": torch.ones(D_SAE)}, "has log_threshold, which would be ignored"),
        ("jumprelu", {}, "'jumprelu', lacks threshold; expected"),
        ("gated", {}, "'gated', lacks b_gate, b_mag, r_mag and has b_enc, which would be ignored"),
        ("jumprelu", {"threshold": torch.full((D_SAE,), torch.nan)}, "threshold contains NaN"),
        ("topk", {"b_dec": torch.full((D_IN,), torch.inf)}, "b_dec contains NaN or infinity"),
        ("topk", {"W_dec": torch.zeros(D_SAE, D_IN, dtype=torch.int8)}, "W_dec has the dtype torch.int8"),
    ],
)
def test_weights_that_are_not_those_of_the_architecture_are_refused(architecture, extra, message, tmp_path):
    refused(saelens_folder(tmp_path, extra, architecture=architecture), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_in": 9}, "has d_in 8 by its weights and 9 in its configuration"),
        ({"d_sae": 21}, "has d_sae 20 by its weights and 21 in its configuration"),
        ({"dtype": "int8"}, "dtype 'int8' in its configuration; expected a dtype such as 'float32'"),
        ({"dtype": 7}, "dtype 7 in its configuration"),
        ({"k": 4.7}, "has k 4.7 in its configuration; expected a value of type int"),
        ({"apply_b_dec_to_input": "False"}, "has apply_b_dec_to_input 'False' in its configuration; expected .* bool"),
        ({"normalize_activations": ["none"]}, "normali[sz]es its input by .'none'.; expected none, "),
        ({"architecture": "standard", "rescale_acts_by_decoder_norm": True}, "SAELens applies only to topk: fold"),
    ],
)
def test_a_configuration_of_other_weights_is_refused(changes, message, tmp_path):
    refused(saelens_folder(tmp_path, **changes), message)


def test_weights_are_held_in_the_configured_type(tmp_path):
    assert load_sae(saelens_folder(tmp_path, dtype="torch.float64")).W_enc.dtype == torch.float64


def test_another_sparsify_size_or_tensor_is_refused(tmp_path):
    folder = sparsify_folder(tmp_path / "layers.5", num_latents=21)
    refused(folder, "has num_latents 20 by its weights and 21")
    tensors = {**load_file(folder / "sae.safetensors"), "W_skip": torch.zeros(D_IN, D_IN)}
    save_file(tensors, folder / "sae.safetensors")
    refused(folder, "has W_skip, which would be ignored")


@pytest.mark.parametrize("k", [0, D_SAE + 1])
def test_a_k_that_cannot_be_is_refused(k, tmp_path):
    refused(saelens_folder(tmp_path, k=k), f"{tmp_path}: k is {k}; with 20 latents it must be 1 to 20")


@pytest.mark.parametrize(
    ("changes", "normalization"),
    [
        ({"model_name": "gpt2-small"}, "centre"),
        ({"model_class_name": "HookedTransformer"}, "centre"),
        ({"model_name": "gemma-2b"}, "none"),
        ({"model_name": "meta-llama/Llama-3.1-8B"}, "none"),
        ({"model_class_name": "AutoModelForCausalLM"}, "none"),
        ({"model_from_pretrained_kwargs": {"center_writing_weights": False}}, "none"),
        ({"model_from_pretrained_kwargs": None}, "none"),
    ],
    ids=str,
)
def test_x_is_centred_where_the_model_was(changes, normalization, tmp_path):
    metadata = {"model_from_pretrained_kwargs": {"center_writing_weights": True}, **changes}
    assert load_sae(saelens_folder(tmp_path, metadata=metadata)).normalization == normalization


def test_a_centred_model_and_a_constant_norm_are_refused(tmp_path):
    metadata = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    folder = saelens_folder(tmp_path, metadata=metadata, normalize_activations="constant_norm_rescale")
    refused(folder, "'constant_norm_rescale' and reads a model with center_writing_weights")


def incomplete(folder: Path, lacking: str) -> Path:
    saelens_folder(folder)
    weights_file, config_file = folder / "sae_weights.safetensors", folder / "cfg.json"
    if lacking == "k":
        config_file.write_text(json.dumps({"architecture": "topk"}))
    elif lacking == "a readable cfg.json":
        config_file.write_text("{")
    elif lacking == "a configuration":
        config_file.write_text("[1, 2]")
    elif lacking == "its weights":
        weights_file.unlink()
    elif lacking == "readable weights":
        weights_file.write_bytes(b"nothing")
    else:  # W_dec
        save_file({"W_enc": torch.zeros(D_IN, D_SAE)}, weights_file)
    return folder


@pytest.mark.parametrize(
    "lacking", ["k", "a readable cfg.json", "a configuration", "its weights", "readable weights", "W_dec"]
)
def test_an_incomplete_saelens_folder_is_refused(lacking, tmp_path):
    refused(incomplete(tmp_path, lacking), str(tmp_path))


def test_the_registry_without_saelens_says_what_to_install(monkeypatch):
    for part in [name for name in sys.modules if name.startswith("sae_lens.")]:
        monkeypatch.delitem(sys.modules, part)  # what another test has imported would still be found
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    refused("saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre", r"pip install 'cocomix\[sae\]'")


# Where it reads


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.5.hook_resid_post", 5),
        ("blocks.5.hook_resid_pre", 4),
        ("blocks.11.hook_resid_post", 11),
        ("model.layers.20", 20),
        ("transformer.h.0", 0),
        ("some_name", None),
        ("", None),
        (None, None),
    ],
)
def test_the_layer_is_read_from_the_configuration(hook, layer, tmp_path):
    assert load_sae(saelens_folder(tmp_path, metadata={"hook_name": hook})).teacher_layer == layer


def test_an_old_configuration_names_the_layer_too(tmp_path):
    assert load_sae(saelens_folder(tmp_path, hook_point="blocks.3.hook_resid_pre")).teacher_layer == 2


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.0.hook_resid_pre",
        "blocks.3.hook_resid_mid",
        "blocks.3.hook_mlp_out",
        "blocks.3.attn.hook_z",
        "blocks.3.ln2.hook_normalized",
        "hook_embed",
        "model.layers.3.mlp",
    ],
)
def test_a_place_that_is_not_tapped_is_refused(hook, tmp_path):
    refused(saelens_folder(tmp_path, metadata={"hook_name": hook}), f"reads {hook}, but only the residual")


@pytest.mark.parametrize(("name", "layer"), [("layers.5", 5), ("transformer.h.7", 7), ("h.2", 2), ("mine", None)])
def test_a_sparsify_folder_is_named_after_what_it_reads(name, layer, tmp_path):
    sae = load_sae(sparsify_folder(tmp_path / name))
    assert (sae.teacher_layer, sae.k, sae.normalization) == (layer, K, "none")


def test_a_sparsify_folder_of_another_place_is_refused(tmp_path):
    refused(sparsify_folder(tmp_path / "layers.5.mlp"), "reads layers.5.mlp, but only the residual stream")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "groupmax"}, "has activation groupmax; expected a sparsify autoencoder"),
        ({"transcode": True, "skip_connection": True}, "has transcode, skip_connection; expected"),
        ({"signed": True}, "has signed; expected"),
    ],
)
def test_a_sparse_coder_that_is_no_topk_autoencoder_is_refused(changes, message, tmp_path):
    refused(sparsify_folder(tmp_path / "layers.5", **changes), message)


# OpenAI's files


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
    refused(
        corrupt(tmp_path / "sae.pt", kind), r"sae.pt (is not an SAE in OpenAI's format: \w+|lacks decoder.weight, )"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "Identity"}, "the activation 'Identity' followed by 'ReLU'; expected 'TopK' or 'ReLU'"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "'TopK' followed by 'Identity'"),
        ({"activation_state_dict": {}}, "sae.pt is not an SAE in OpenAI's format: KeyError: 'k'"),
    ],
)
def test_an_openai_sae_of_another_activation_is_refused(changes, message, tmp_path):
    torch.save({**openai_state(), **changes}, tmp_path / "sae.pt")
    refused(tmp_path / "sae.pt", message)


def test_an_openai_sae_with_a_tied_decoder_is_refused(tmp_path):
    state = openai_state()
    del state["decoder.weight"]
    torch.save(state, tmp_path / "sae.pt")
    refused(tmp_path / "sae.pt", "lacks decoder.weight; expected .*: tied decoders are not supported")


def test_an_openai_sae_gives_its_sizes(tmp_path):
    torch.save(openai_state(), tmp_path / "sae.pt")
    sae = load_sae(str(tmp_path / "sae.pt"))
    assert (sae.d_in, sae.d_sae, sae.k, sae.max_active, sae.teacher_layer) == (D_IN, D_SAE, K, K, None)
    assert (sae.normalization, sae.subtract_b_dec) == ("layer_norm", True)


@pytest.mark.parametrize("named", [True, False], ids=["activation: ReLU", "no activation on record"])
def test_an_openai_relu_sae_equals_its_formula(named, tmp_path):
    state = {key: value for key, value in openai_state().items() if not key.startswith("activation")}
    torch.save({**state, **({"activation": "ReLU"} if named else {})}, tmp_path / "sae.pt")
    sae, x = load_sae(tmp_path / "sae.pt"), torch.randn(3, 5, D_IN)
    latents = torch.relu((x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"])
    torch.testing.assert_close(dense(sae, x), latents)
    torch.testing.assert_close(sae.reconstruct(x), latents @ state["decoder.weight"].T + state["pre_bias"])


# The encoder


def dense(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    latents = sae.encode(x)
    return x.new_zeros(*x.shape[:-1], sae.d_sae).scatter_add(-1, latents.indices, latents.values)


def relu_sae(shift: float = 0.0, **settings: Any) -> SparseAutoencoder:
    w = weights()
    return SparseAutoencoder(**{**w, "b_enc": w["b_enc"] + shift}, threshold=torch.zeros(D_SAE), **settings)


def test_latents_are_at_most_k_and_never_negative():
    sae = SparseAutoencoder(**weights(), k=K)
    latents = sae.encode(torch.randn(3, 5, D_IN))
    assert latents.values.shape == latents.indices.shape == (3, 5, K)
    assert latents.values.min() >= 0
    assert latents.indices.dtype == torch.int64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of k .* and threshold"),
        ({"k": K, "threshold": torch.zeros(D_SAE)}, "exactly one of k .* and threshold"),
        ({"threshold": torch.full((D_SAE,), -0.1)}, "threshold has negative entries"),
        ({"threshold": torch.zeros(D_SAE + 1)}, "threshold has the shape"),
        ({"k": K, "normalization": "batch"}, "normalization is 'batch'; expected one of none, centre"),
        ({"threshold": torch.zeros(D_SAE), "max_active": 0}, "max_active is 0; expected 1 or more"),
        ({"k": K, "W_enc": torch.zeros(D_IN)}, "W_enc has the shape"),
        ({"k": K, "W_enc": torch.zeros(D_IN, 0)}, "W_enc has the shape"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        SparseAutoencoder(**{**weights(), **settings})


def test_a_threshold_decides_strictly_and_leaves_the_value():
    identity = torch.eye(4)
    sae = SparseAutoencoder(
        W_enc=identity,
        b_enc=torch.zeros(4),
        W_dec=identity,
        b_dec=torch.zeros(4),
        threshold=torch.tensor([0, 1, 2, 3.0]),
    )
    found = dense(sae, torch.tensor([[0.5, 1.0, 2.5, 2.9], [-1.0, 0.9, 2.0, -5.0]]))
    assert torch.equal(found, torch.tensor([[0.5, 0.0, 2.5, 0.0], [0.0, 0.0, 0.0, 0.0]]))


def test_no_slot_is_kept_that_no_token_needs():
    sae, x = relu_sae(shift=-4.0), torch.randn(2, 7, D_IN)
    latents = sae.encode(x)
    active = (latents.values > 0).sum(-1)
    assert 1 < latents.values.shape[-1] == active.max() < D_SAE
    assert active.min() < active.max()
    assert latents.indices.min() >= 0 and latents.indices.max() < D_SAE
    assert latents.values.untyped_storage().nbytes() == latents.values.numel() * 4
    assert sae.tokens_cut == 0


@pytest.mark.parametrize("shape", [(3, D_IN), (0, D_IN), (D_IN,)])
def test_where_nothing_is_active_there_is_one_empty_slot(shape):
    sae = relu_sae(shift=-1000.0)
    latents = sae.encode(torch.randn(shape))
    assert latents.values.shape == (*shape[:-1], 1)
    assert not latents.values.any()


def test_the_strongest_are_kept_and_the_cut_tokens_counted_and_said_once(tmp_path):
    save_file({**weights(), "threshold": torch.full((D_SAE,), 0.5)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "jumprelu"}))
    whole, sae, x = load_sae(tmp_path), load_sae(tmp_path, max_active=8), torch.randn(4, 10, D_IN)
    assert (whole.max_active, sae.max_active, sae.tokens_cut) == (D_SAE, 8, 0)
    everything = dense(whole, x)
    cut = int(((everything > 0).sum(-1) > 8).sum())
    assert 0 < cut < 40
    with pytest.warns(UserWarning, match=rf"{cut} of 40 tokens have more than max_active = 8 .*raise max_active"):
        latents = sae.encode(x)
    assert sae.tokens_cut == cut
    torch.testing.assert_close(latents.values, everything.topk(8).values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sae.encode(x)
    assert sae.tokens_cut == 2 * cut


def test_the_limit_is_256_unless_it_is_given_and_k_for_topk(tmp_path):
    wide = {"W_enc": torch.randn(D_IN, 400), "b_enc": torch.randn(400), "W_dec": torch.randn(400, D_IN)}
    folder = saelens_folder(tmp_path, wide, architecture="standard")
    assert load_sae(folder).max_active == MAX_ACTIVE == 256
    assert load_sae(folder, max_active=300).max_active == 300
    refused(folder, "max_active is 0; expected 1 or more", max_active=0)
    assert load_sae(saelens_folder(tmp_path), max_active=9).max_active == K


def test_encoding_builds_no_graph():
    for sae in (SparseAutoencoder(**weights(), k=K), relu_sae()):
        assert list(sae.parameters()) == []
        assert not sae.encode(torch.randn(3, D_IN, requires_grad=True)).values.requires_grad


def test_a_token_of_zeros_survives_scaling_to_a_constant_norm():
    sae = relu_sae(normalization="constant_norm_rescale")
    assert sae.encode(torch.zeros(2, D_IN)).values.isfinite().all()
    assert sae.reconstruct(torch.zeros(2, D_IN)).isfinite().all()


@pytest.mark.parametrize("rows_per_chunk", [1, 3])
@pytest.mark.parametrize("kind", ["topk", "threshold"])
def test_encoding_in_chunks_equals_encoding_at_once(kind, rows_per_chunk, monkeypatch):
    settings = {"k": K} if kind == "topk" else {"threshold": torch.rand(D_SAE)}
    sae = SparseAutoencoder(**weights(), **settings, normalization="layer_norm").double()
    x = torch.randn(2, 7, D_IN).double()
    whole = sae.encode(x)
    chunks: list[int] = []
    addmm = torch.addmm
    monkeypatch.setattr(
        sae_module.torch, "addmm", lambda bias, part, W: (chunks.append(len(part)), addmm(bias, part, W))[1]
    )
    monkeypatch.setitem(sae_module.ENCODE_BUFFER_BYTES, "cpu", rows_per_chunk * D_SAE * (8 + (kind == "threshold")))
    found = sae.encode(x)
    assert len(chunks) == -(-14 // rows_per_chunk)
    assert max(chunks) == rows_per_chunk
    active = whole.values > 0
    assert torch.equal(found.indices[active], whole.indices[active])
    torch.testing.assert_close(found.values, whole.values, rtol=1e-12, atol=1e-12)


class DenseBytes(TorchDispatchMode):
    """The most bytes at once of all tensors that are d_sae wide, whoever made them."""

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.d_sae, self.most = d_sae, 0
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, Tensor) and each.ndim == 2 and each.shape[-1] == self.d_sae:
                self.alive.add(each.untyped_storage())
        self.most = max(self.most, sum(each.nbytes() for each in self.alive))
        return out


@pytest.mark.parametrize("kind", ["topk", "threshold"])
def test_what_is_dense_in_an_encoding_stays_within_its_budget(kind, monkeypatch):
    rows, width = 400, 500
    settings = {"k": K} if kind == "topk" else {"threshold": torch.rand(width), "max_active": 300}
    sae = SparseAutoencoder(
        W_enc=torch.randn(D_IN, width),
        b_enc=torch.randn(width),
        W_dec=torch.randn(width, D_IN),
        b_dec=torch.randn(D_IN),
        **settings,
    )
    budget = 60 * width * 5
    monkeypatch.setitem(sae_module.ENCODE_BUFFER_BYTES, "cpu", budget)
    with DenseBytes(width) as dense_bytes:
        sae.encode(torch.randn(rows, D_IN))
    assert budget * 0.9 < dense_bytes.most <= budget


def test_a_buffer_smaller_than_one_row_still_encodes(monkeypatch):
    sae, x = SparseAutoencoder(**weights(), k=K), torch.randn(3, D_IN)
    whole = sae.encode(x)
    monkeypatch.setitem(sae_module.ENCODE_BUFFER_BYTES, "cpu", 1)
    assert torch.equal(sae.encode(x).indices, whole.indices)


def test_an_sae_encodes_in_the_precision_of_its_weights():
    sae = SparseAutoencoder(**weights(), k=K)
    x = torch.randn(3, D_IN)
    assert sae.encode(x.bfloat16()).values.dtype == torch.float32
    assert sae.reconstruct(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(sae.encode(x.bfloat16()).values, sae.encode(x.bfloat16().float()).values)


def test_a_surrounding_autocast_changes_nothing():
    for sae in (SparseAutoencoder(**weights(), k=K, normalization="layer_norm"), relu_sae()):
        x = torch.randn(30, D_IN)
        latents, rebuilt = sae.encode(x), sae.reconstruct(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sae.encode(x).values, latents.values)
            assert torch.equal(sae.encode(x).indices, latents.indices)
            assert torch.equal(sae.reconstruct(x), rebuilt)
