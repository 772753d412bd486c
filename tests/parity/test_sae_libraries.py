"""An SAE that another library saved gives here what it gives there."""

from __future__ import annotations

import json
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cocomix import InputError
from cocomix.concepts.sae import Latents, SparseAutoencoder
from cocomix.concepts.sae_loading import load_sae
from cocomix.concepts.sae_training import SAEConfig, save_sae
from cocomix.concepts.trainable_sae import InputScaling, TrainableSAE

D_IN, D_SAE, K = 24, 200, 40
ARCHITECTURES = ("Standard", "TopK", "JumpReLU", "Gated")
NORMS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@torch.no_grad()
def draw(sae: torch.nn.Module) -> None:
    """Every tensor at random; some tokens have fewer than K active latents, some latents a θ below 0."""
    for name, tensor in sae.named_parameters():
        tensor.normal_(std=0.4)
        if name in ("b_enc", "b_gate"):
            tensor -= 1.5
        if name == "threshold":
            tensor.add_(0.8)
        if name == "W_dec":
            tensor *= torch.linspace(0.5, 2.0, len(tensor))[:, None]  # the norms of the directions matter
    for name, tensor in sae.named_buffers():
        assert name == "topk_threshold"
        tensor.fill_(0.9)


def saelens(architecture: str, training: bool = False, **settings: Any) -> Any:
    name = f"{architecture}{'Training' if training else ''}SAE"
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "device": "cpu"} | ({"k": K} if "TopK" in architecture else {})
    config = getattr(sae_lens, f"{name}Config")(**sizes, **settings)
    sae = getattr(sae_lens, name)(config)
    draw(sae)
    return sae


def dense(latents: Latents) -> Tensor:
    # Unused slots may repeat an id, with the value 0.
    return torch.zeros(*latents.values.shape[:-1], D_SAE).scatter_add(-1, latents.indices, latents.values)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def assert_equal(ours: SparseAutoencoder, theirs: Any, x: Tensor, read: Tensor | None = None) -> None:
    """The same latents and reconstruction for x; `read` is what the other library would be given for it."""
    expected = theirs.encode(x if read is None else read)
    offset = 0.0 if read is None else x - read
    rebuilt = theirs.decode(expected) + offset
    found, active = dense(ours.encode(x)), expected > 0
    assert 10 < active.sum(-1).float().mean() < 150
    assert torch.equal(found > 0, active)
    assert_close(found, expected)
    assert_close(ours.reconstruct(x), rebuilt)


def activations(*shape: int) -> Tensor:
    return torch.randn(*shape, D_IN) * 2 + 0.5


@pytest.mark.parametrize("b_dec", [True, False], ids=["b_dec", "no_b_dec"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_saelens_folder(architecture, norm, b_dec, tmp_path):
    theirs = saelens(architecture, normalize_activations=norm, apply_b_dec_to_input=b_dec)
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path)
    assert (ours.d_in, ours.d_sae, ours.k) == (D_IN, D_SAE, K if architecture == "TopK" else None)
    assert_equal(ours, theirs, activations(3, 20))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_saelens_loads_what_is_saved_here(architecture, tmp_path):
    config = SAEConfig(architecture=architecture, d_sae=D_SAE, k=K, teacher_layer=2)
    settings = {"l0_coefficient": 0.1, "auxiliary_weight": 0.0, "threshold_rate": 0.1}
    sae = TrainableSAE(D_IN, D_SAE, architecture, k=K, **settings)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.4)
        sae.b_dec.normal_()
        sae.threshold = torch.nn.Parameter(torch.rand(D_SAE)) if architecture == "jumprelu" else torch.tensor(0.4)
    save_sae(sae, InputScaling(torch.full((D_IN,), 0.5), torch.linspace(0.5, 3, D_IN)), config, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == ("topk" if architecture == "topk" else "jumprelu")
    ours = load_sae(tmp_path)
    assert ours.teacher_layer == 2
    assert_equal(ours, theirs, activations(3, 20))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [(name, {}) for name in (*ARCHITECTURES, "BatchTopK", "MatryoshkaBatchTopK")]
    + [(name, {"rescale_acts_by_decoder_norm": False}) for name in ("TopK", "BatchTopK")],
)
def test_what_saelens_saves_when_training_ends(architecture, settings, tmp_path):
    if architecture.startswith("Matryoshka"):
        settings = {"matryoshka_widths": [50, D_SAE]}
    saelens(architecture, training=True, **settings).save_inference_model(tmp_path)
    assert_equal(load_sae(tmp_path), sae_lens.SAE.load_from_disk(tmp_path), activations(3, 20))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_training_checkpoint_of_saelens(architecture, tmp_path):
    theirs = saelens(architecture, training=True)
    if architecture == "JumpReLU":  # its own clamp, at the next step
        theirs.threshold.data.clamp_(min=0)
    theirs.save_model(tmp_path)
    assert_equal(load_sae(tmp_path), theirs, activations(3, 20))


def test_an_old_checkpoint_keeps_the_logarithm_of_its_threshold(tmp_path):
    saelens("JumpReLU", training=True).save_model(tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    weights["log_threshold"] = weights.pop("threshold").abs().log()
    save_file(weights, tmp_path / "sae_weights.safetensors")
    assert_equal(load_sae(tmp_path), sae_lens.TrainingSAE.load_from_disk(tmp_path), activations(40))


@pytest.mark.parametrize(("norm", "b_dec"), list(product(("none", "layer_norm"), (True, False))))
def test_a_topk_sae_that_rescales_by_the_decoder_norm(norm, b_dec, tmp_path):
    theirs = saelens("TopK", normalize_activations=norm, apply_b_dec_to_input=b_dec, rescale_acts_by_decoder_norm=True)
    theirs.save_model(tmp_path)
    ours, x = load_sae(tmp_path), activations(3, 20)
    assert_equal(ours, theirs, x)
    if norm == "none":
        # Attribution reads a · W_dec, so that product, and not each of the two, must be SAELens'.
        assert_close(dense(ours.encode(x)) @ ours.W_dec + ours.b_dec, theirs(x).detach())


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_an_sae_of_a_model_with_centred_writing_weights_reads_x_less_its_mean(norm, tmp_path):
    theirs = saelens("Standard", normalize_activations=norm)
    theirs.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    theirs.save_model(tmp_path)
    x = activations(3, 20) + torch.randn(3, 20, 1) * 3
    assert_equal(load_sae(tmp_path), theirs, x, read=x - x.mean(-1, keepdim=True))


@torch.no_grad()
def test_centred_writing_weights_take_the_mean_out_of_the_residual_stream():
    """What the centring rests on, in TransformerLens itself."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=3, d_model=16, n_ctx=12, d_head=4, d_vocab=30, act_fn="gelu_new", normalization_type="LN"
    )
    plain, centered = HookedTransformer(config), HookedTransformer(config)
    for parameter in plain.parameters():
        parameter.normal_(std=0.5)
    off = {"fold_ln": False, "center_unembed": False, "fold_value_biases": False}
    centered.load_and_process_state_dict(plain.state_dict(), center_writing_weights=True, **off)
    ids = torch.randint(30, (2, 12))
    for layer in range(3):
        name = f"blocks.{layer}.hook_resid_post"
        x = plain.run_with_cache(ids, names_filter=name)[1][name]
        assert x.mean(-1).abs().max() > 0.1
        assert_close(x - x.mean(-1, keepdim=True), centered.run_with_cache(ids, names_filter=name)[1][name])


# SAELens' registry: SAE.from_pretrained itself runs, on a hub that is a folder


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Files of the hub, at user/repo/path; nothing else can be fetched."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def fetched(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        path = tmp_path / repo_id / subfolder / filename
        if not path.is_file():
            raise LocalEntryNotFoundError(f"no {path}\nand no network")
        return str(path)

    monkeypatch.setattr(loaders, "hf_hub_download", fetched)
    return tmp_path


def as_before_version_6(folder: Path, hook: str) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    flat = {key: config[key] for key in ("d_in", "d_sae", "dtype")}
    (folder / "cfg.json").write_text(json.dumps({**flat, "hook_point": hook, "model_name": "gpt2-small"}))


def test_the_registry_and_what_it_knows_beyond_the_files(hub):
    """Joseph Bloom's GPT-2 SAEs: an old configuration, resid_pre, and the registry's word on centring."""
    name = "blocks.8.hook_resid_pre"
    folder = hub / "jbloom/GPT2-Small-SAEs-Reformatted" / name
    theirs = saelens("Standard")
    theirs.save_model(folder)
    as_before_version_6(folder, name)
    ours = load_sae(f"saelens:gpt2-small-res-jb/{name}")
    assert (ours.normalization, ours.teacher_layer, ours.k) == ("centre", 7, None)
    x = activations(30)
    assert_equal(ours, theirs, x, read=x - x.mean(-1, keepdim=True))


def test_a_folder_from_before_version_6(hub):
    theirs = saelens("Standard", apply_b_dec_to_input=True)
    theirs.save_model(hub)
    as_before_version_6(hub, "blocks.2.hook_resid_post")
    ours = load_sae(hub)
    assert (ours.normalization, ours.teacher_layer) == ("none", 2)
    assert_equal(ours, sae_lens.SAE.load_from_disk(hub), activations(30))


def test_the_registry_folds_the_scale_that_it_knows(hub):
    name = "blocks.12.hook_resid_post"
    entry = sae_lens.loading.pretrained_saes_directory.get_pretrained_saes_directory()["gemma-2b-res-jb"]
    theirs = saelens("Standard", normalize_activations="expected_average_only_in")
    theirs.cfg.metadata.hook_name = name
    theirs.save_model(hub / entry.repo_id / entry.saes_map[name])
    ours = load_sae(f"saelens:gemma-2b-res-jb/{name}")
    assert (ours.teacher_layer, ours.normalization) == (12, "none")
    theirs.fold_activation_norm_scaling_factor(entry.norm_scaling_factor[name])
    assert_equal(ours, theirs, activations(30) * 5)


def test_a_hub_repository_that_is_not_in_the_registry(hub):
    theirs = saelens("JumpReLU")
    theirs.save_model(hub / "someone/their-saes/gpt2/layer_5")
    ours = load_sae("saelens:someone/their-saes/gpt2/layer_5", max_active=150)
    assert ours.max_active == 150
    assert_equal(ours, theirs, activations(30))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gpt2-smal-res-jb/blocks.8.hook_resid_pre", "no release 'gpt2-smal-res-jb'; did you mean 'gpt2-small-res-jb'"),
        ("gpt2-small-res-jb/blocks.8.hook_resid_pr", "no SAE .*; did you mean 'blocks.8.hook_resid_pre'"),
        ("gpt2-small-res-jb", "has no SAE ''; it has blocks.0.hook_resid_pre, "),
        ("gpt2-small-res-jb/blocks.8.hook_resid_pre", "not in the local cache and the Hugging Face hub cannot be"),
        ("gemma-scope-2b-pt-rez/layer_20/width_16k/average_l0_71", "cannot be reached; did you mean 'gemma-scope-2b"),
    ],
)
def test_the_registry_refuses_in_one_line(source, message, hub):
    with pytest.raises(InputError, match=message) as caught:
        load_sae(f"saelens:{source}")
    assert "\n" not in str(caught.value)


def test_a_transcoder_is_refused_after_it_was_fetched(hub):
    settings = {"apply_b_dec_to_input": False, "d_out": D_IN}
    theirs = sae_lens.Transcoder(sae_lens.TranscoderConfig(d_in=D_IN, d_sae=D_SAE, **settings))
    theirs.save_model(hub / "someone/transcoders/layer_5")
    for source in ("saelens:someone/transcoders/layer_5", str(hub / "someone/transcoders/layer_5")):
        with pytest.raises(InputError, match=r"architecture 'transcoder' .it reads at one site"):
            load_sae(source)


def test_the_notes_on_loading_other_models_are_kept_quiet(hub):
    name = "blocks.1.hook_resid_pre"
    saelens("Standard").save_model(hub / "jbloom/GPT2-Small-SAEs-Reformatted" / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_sae(f"saelens:gpt2-small-res-jb/{name}")


# EleutherAI's sparsify


@pytest.mark.parametrize("hookpoint", ["layers.5", "layers.5/seed0"])
def test_a_sparsify_folder(hookpoint, tmp_path):
    sparsify = pytest.importorskip("sparsify")
    theirs = sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(num_latents=D_SAE, k=K), dtype=torch.float32)
    draw(theirs)
    theirs.save_to_disk(tmp_path / hookpoint)
    ours, x = load_sae(tmp_path / hookpoint), activations(50)
    assert (ours.k, ours.teacher_layer) == (K, 5)
    with torch.no_grad():
        values, indices, _ = theirs.encode(x)
        expected, rebuilt = dense(Latents(values, indices)), theirs.decode(values, indices)
    found = dense(ours.encode(x))
    assert torch.equal(found > 0, expected > 0)
    assert_close(found, expected)
    assert_close(ours.reconstruct(x), rebuilt)
