"""Load sparse autoencoders from SAELens (folders and registry), EleutherAI's sparsify, and OpenAI's `.pt` files.

SAEs that are not one encoder and one decoder of the residual stream between two blocks are refused with the reason.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cocomix.common import files
from cocomix.common.errors import InputError, UnreachableError, did_you_mean, error_message
from cocomix.concepts.sae import MAX_ACTIVE, SparseAutoencoder
from cocomix.concepts.sae_checks import listed, precision, require_sizes, require_tensors, require_type

REGISTRY = "saelens:"
CONFIG, SAELENS_WEIGHTS, SPARSIFY_WEIGHTS = "cfg.json", "sae_weights.safetensors", "sae.safetensors"
_ENCODER_AND_DECODER = frozenset({"W_enc", "b_enc", "W_dec", "b_dec"})
SAELENS_TENSORS = {
    "standard": _ENCODER_AND_DECODER,
    "topk": _ENCODER_AND_DECODER,
    "jumprelu": _ENCODER_AND_DECODER | {"threshold"},
    "gated": frozenset({"W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"}),
}
"""All tensors of each architecture. Others are refused, so that no tensor the encoder needs is ignored."""
SAELENS_SCALES = ("scaling_factor", "finetuning_scaling_factor")
SPARSIFY_TENSORS = frozenset({"encoder.weight", "encoder.bias", "W_dec", "b_dec"})
OPENAI_TENSORS = frozenset({"encoder.weight", "decoder.weight", "latent_bias", "pre_bias"})
OPENAI_STATISTICS = {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
OPENAI_OTHERS = frozenset({"activation", "activation_state_dict"} | OPENAI_STATISTICS)
REFUSED_ARCHITECTURES = {
    **dict.fromkeys(
        ("batchtopk", "matryoshka_batchtopk"),
        "a training checkpoint: load it with SAELens and save it with save_inference_model, as jumprelu",
    ),
    **dict.fromkeys(
        ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
        "it reads at one site of the model and writes at another",
    ),
    "abstopk": "its latents may be negative",
    "matching_pursuit": "it encodes iteratively, not with one matrix",
    "temporal": "its encoding of a token depends on earlier tokens",
}
BLOCK = re.compile(r"(?:[A-Za-z_]\w*\.)*?(?:blocks|layers|layer|h)\.(\d+)(?:\.(?P<within>.+))?")
"""A decoder block or a module within one, as TransformerLens and Transformers name them."""
RMS_NORM_FAMILIES = re.compile(r"llama|mi[sx]tral|gemma|qwen|olmo|phi-?[34]|yi-|gpt-oss|apertus", re.IGNORECASE)


def load_sae(source: str | Path, max_active: int | None = None) -> SparseAutoencoder:
    """Load a sparse autoencoder.

    Args:
        source: a SAELens folder (`cfg.json`, `sae_weights.safetensors`); `saelens:RELEASE/SAE_ID` from SAELens'
            registry, where RELEASE may be a Hub repository `user/repo`; a sparsify folder (`cfg.json`,
            `sae.safetensors`); or an OpenAI `.pt` file.
        max_active: maximum number of latents kept per token, for SAEs without a k (default 256); ignored by TopK SAEs.

    Raises:
        InputError: the source does not exist, is not an SAE, or is of an unsupported kind.
    """
    sae = _opened(source, MAX_ACTIVE if max_active is None else max_active)
    for name, weight in sae.state_dict().items():
        # An infinite threshold is allowed: its latent is never active.
        if weight.isnan().any() or (name != "threshold" and weight.isinf().any()):
            raise InputError(f"the SAE {source} is damaged: its {name} contains NaN or infinity; give an undamaged one")
    return sae


def _opened(source: str | Path, limit: int) -> SparseAutoencoder:
    if str(source).startswith(REGISTRY):
        return _from_registry(str(source), limit)
    path = Path(source)
    if (path / CONFIG).is_file():
        if (path / SPARSIFY_WEIGHTS).is_file():
            return _from_sparsify(path)
        return _from_saelens_folder(path, limit)
    if path.is_file():
        return _from_openai(path, limit)
    raise _nothing_at(path)


def published_sizes(source: str, max_active: int | None = None) -> tuple[int, int, int]:
    """Return d_in, d_sae, and the latents kept per token of a `saelens:` source without downloading its weights.

    Raises:
        InputError: there is no such SAE, or the Hub cannot be reached.
    """
    release, sae_id, _ = _in_registry(source)
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    try:
        config = _upgraded(load_sae_config_from_huggingface(release, sae_id))
    except Exception as error:
        raise _not_fetched(source, error, "") from None
    return config["d_in"], config["d_sae"], config.get("k", MAX_ACTIVE if max_active is None else max_active)


# SAELens


def _from_saelens_folder(folder: Path, max_active: int) -> SparseAutoencoder:
    with _reading(folder, "a SAELens folder"):
        config = _upgraded(files.read_json(folder / CONFIG))
        _refuse_saelens(config, str(folder))
        _refuse_unfolded(folder)
        weights = load_file(folder / SAELENS_WEIGHTS)
        if (dtype := config.get("dtype")) is not None:
            weights = {name: tensor.to(precision(dtype, str(folder))) for name, tensor in weights.items()}
        return _from_saelens(config, weights, str(folder), max_active)


def _from_registry(source: str, max_active: int) -> SparseAutoencoder:
    release, sae_id, published = _in_registry(source)
    from sae_lens import SAE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they concern TransformerLens models, which are not used here
        try:
            theirs = SAE.from_pretrained(release, sae_id, device="cpu")
        except Exception as error:
            hint = did_you_mean(release.split("/")[0], published) if release not in published else ""
            raise _not_fetched(source, error, hint) from None
    with _reading(source, "an SAE that SAELens can load"):
        config = _upgraded(theirs.cfg.to_dict())
        _refuse_saelens(config, source)
        return _from_saelens(config, theirs.state_dict(), source, max_active)


def _in_registry(source: str) -> tuple[str, str, dict[str, list[str]]]:
    """Return release and SAE id of a `saelens:` source, and the SAE ids of every release of SAELens.

    Raises:
        InputError: there is no such SAE, or SAELens is not installed.
    """
    try:
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    except ImportError:
        raise InputError(f"{source} needs SAELens; install it with: pip install 'cocomix[sae]'") from None
    published = {name: list(entry.saes_map) for name, entry in get_pretrained_saes_directory().items()}
    return *_release_and_id(source.removeprefix(REGISTRY), published), published


def _release_and_id(text: str, published: Mapping[str, list[str]]) -> tuple[str, str]:
    """Split RELEASE/SAE_ID or USER/REPO/SAE_ID, where SAE_ID may contain slashes."""
    release, _, sae_id = text.partition("/")
    if release in published:
        if sae_id not in published[release]:
            hint = did_you_mean(sae_id, published[release])
            raise InputError(
                f"SAELens' release {release} has no SAE {sae_id!r}{hint}; it has {listed(published[release])}"
            )
        return release, sae_id
    if text.count("/") < 2:
        raise InputError(
            f"SAELens knows no release {release!r}{did_you_mean(release, published)}; "
            "expected saelens:RELEASE/SAE_ID or saelens:USER/REPO/SAE_ID"
        )
    user, repo, sae_id = text.split("/", 2)
    return f"{user}/{repo}", sae_id


def _not_fetched(source: str, error: Exception, hint: str) -> InputError:
    offline = isinstance(error, ConnectionError) or re.search(
        "LocalEntry|Connect|Offline|Timeout", type(error).__name__
    )
    if offline:
        return UnreachableError(
            f"{source} is not in the local cache and the Hugging Face hub cannot be reached{hint}; download it on a "
            "machine with access, or unset HF_HUB_OFFLINE if it is set"
        )
    return InputError(f"SAELens could not load {source}: {type(error).__name__}: {error_message(error)}{hint}")


def _upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """Convert a SAELens configuration to the form of version 6; older ones are flat, with other names and defaults."""
    config = {"architecture": "standard", "apply_b_dec_to_input": True, **config}
    activation = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    if activation == "topk":
        config["architecture"], config["k"] = "topk", (config.get("activation_fn_kwargs") or {})["k"]
    elif activation != "relu":
        config["architecture"] = f"{config['architecture']} with the activation {activation}"
    norm = config.get("normalize_activations")
    if norm is None or isinstance(norm, bool):
        config["normalize_activations"] = "expected_average_only_in" if norm else "none"
    config["metadata"] = {"hook_name": config.get("hook_point"), **config, **(config.get("metadata") or {})}
    return config


def _refuse_saelens(config: Mapping[str, Any], where: str) -> None:
    architecture = config["architecture"]
    if architecture not in SAELENS_TENSORS:
        reason = REFUSED_ARCHITECTURES.get(architecture)
        raise InputError(
            f"the SAE in {where} is of architecture {architecture!r}{f' ({reason})' if reason else ''}; "
            f"expected one of {', '.join(SAELENS_TENSORS)}"
        )
    if architecture != "topk" and config.get("rescale_acts_by_decoder_norm"):
        raise InputError(
            f"the SAE in {where}, of architecture {architecture!r}, has rescale_acts_by_decoder_norm, which "
            "SAELens applies only to topk: fold the norms of W_dec into the weights"
        )
    if (reshape := config.get("reshape_activations") or "none") != "none":
        raise InputError(
            f"the SAE in {where} reads {reshape} (reshape_activations), within a block; expected an SAE of the "
            "residual stream between blocks"
        )


def _refuse_unfolded(folder: Path) -> None:
    """Refuse a training checkpoint, where SAELens stores the scale or whitening of the input in a separate file."""
    scaler = folder / "activation_scaler.json"
    state = files.read_json(scaler) if scaler.is_file() else {}
    if state.get("scaling_factor") is not None or state.get("has_whitening"):
        raise InputError(
            f"{folder} is a training checkpoint whose input scaling is not folded into the weights "
            f"({scaler.name}); use the SAE that SAELens saves when training ends"
        )


def _from_saelens(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], where: str, max_active: int
) -> SparseAutoencoder:
    """Convert SAELens weights, from a folder or from SAELens' loader."""
    if "log_threshold" in weights and "threshold" not in weights:  # older versions
        weights = {**weights, "threshold": weights["log_threshold"].exp()}
        del weights["log_threshold"]
    architecture = config["architecture"]
    require_tensors(
        weights,
        SAELENS_TENSORS[architecture],
        SAELENS_SCALES,
        f"the SAE in {where}, of architecture {architecture!r},",
        f"state the architecture of these weights in {CONFIG}",
    )
    require_sizes(config, {"d_in": weights["W_dec"].shape[-1], "d_sae": len(weights["W_dec"])}, where)
    for name in SAELENS_SCALES:
        if name in weights and not torch.allclose(weights[name], torch.ones_like(weights[name])):
            raise InputError(f"the SAE in {where} has a {name}, which SAELens 6 does not support; fold it into W_dec")
    return SparseAutoencoder(
        **_saelens_encoder(weights, config, where),
        b_dec=weights["b_dec"],
        max_active=max_active,
        normalization=_saelens_normalization(config, where),
        subtract_b_dec=require_type(config["apply_b_dec_to_input"], bool, "apply_b_dec_to_input", where),
        teacher_layer=_teacher_layer(config["metadata"].get("hook_name"), where),
    )


def _saelens_encoder(weights: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return W_enc, b_enc, W_dec, and k or threshold."""
    architecture, W_enc, W_dec = config["architecture"], weights["W_enc"], weights["W_dec"]
    if architecture == "gated":
        magnitude = weights["r_mag"].exp()
        threshold = weights["b_mag"] - magnitude * weights["b_gate"]
        return {
            "W_enc": W_enc * magnitude,
            "b_enc": weights["b_mag"],
            "W_dec": W_dec,
            "threshold": threshold.clamp(min=0),
        }
    b_enc = weights["b_enc"]
    if architecture == "topk":
        if config.get("rescale_acts_by_decoder_norm", False):
            norms = W_dec.norm(dim=-1).clamp(min=1e-8)
            W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
        return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "k": require_type(config["k"], int, "k", where)}
    threshold = torch.zeros_like(b_enc) if architecture == "standard" else weights["threshold"]
    # SAELens multiplies by ReLU, so a θ below 0 acts as 0.
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "threshold": threshold.clamp(min=0)}


def _saelens_normalization(config: Mapping[str, Any], where: str) -> str:
    norm = config["normalize_activations"]
    if norm == "expected_average_only_in":
        # SAELens folds the scale into the weights when training ends and then sets "none". If that was not
        # done and the registry has no scale, SAELens encodes without scaling, and so does this code.
        warnings.warn(
            f"the SAE in {where} was trained on scaled activations (expected_average_only_in), but its scale is "
            "unknown; it is used unscaled, as by SAELens",
            stacklevel=2,
        )
        norm = "none"
    if norm not in ("none", "layer_norm", "constant_norm_rescale"):
        raise InputError(
            f"the SAE in {where} normalizes its input by {norm!r}; expected none, expected_average_only_in, "
            "layer_norm or constant_norm_rescale (others are folded into the weights when SAELens ends training)"
        )
    if not _centered(config["metadata"]) or norm == "layer_norm":  # layer_norm subtracts the mean itself
        return norm
    if norm == "constant_norm_rescale":
        raise InputError(
            f"the SAE in {where} normalizes by {norm!r} and reads a model with center_writing_weights; "
            "expected only one of the two"
        )
    return "centre"


def _centered(metadata: Mapping[str, Any]) -> bool:
    """Check whether the SAE was trained on a residual stream without its mean over d.

    TransformerLens can subtract the mean over d from everything that writes to the residual stream
    (center_writing_weights). LayerNorms are invariant to this, but the SAE then saw x minus its mean, so the teacher's
    x must be centered too. SAELens records the setting in model_from_pretrained_kwargs (its registry does for
    gpt2-small-res-jb); without a record, the model was loaded without processing. TransformerLens ignores the setting
    for models with RMSNorms, which are not invariant. Only a HookedTransformer has it.
    """
    settings = metadata.get("model_from_pretrained_kwargs") or {}
    return (
        bool(settings.get("center_writing_weights"))
        and metadata.get("model_class_name") in (None, "HookedTransformer")
        and not RMS_NORM_FAMILIES.search(metadata.get("model_name") or "")
    )


# EleutherAI's sparsify


def _from_sparsify(folder: Path) -> SparseAutoencoder:
    with _reading(folder, "a sparsify folder"):
        config = files.read_json(folder / CONFIG)
        refused = [name for name in ("transcode", "skip_connection", "signed") if config.get(name)]
        if (activation := config.get("activation", "topk")) != "topk":
            refused.append(f"activation {activation}")
        if refused:
            raise InputError(
                f"the SAE in {folder} has {', '.join(refused)}; expected a sparsify autoencoder with activation topk"
            )
        weights = load_file(folder / SPARSIFY_WEIGHTS)
        require_tensors(weights, SPARSIFY_TENSORS, (), f"the SAE in {folder}", "save it with sparsify")
        latents = len(weights["W_dec"])
        require_sizes(config, {"d_in": weights["W_dec"].shape[-1], "num_latents": latents}, str(folder))
        # There is one folder per hookpoint, with subfolders if there are several seeds. A hookpoint is the name of
        # the module whose output the SAE reads.
        folder = folder.absolute()
        hookpoint = folder.parent.name if re.fullmatch(r"seed\d+", folder.name) else folder.name
        return SparseAutoencoder(
            W_enc=weights["encoder.weight"].T,
            b_enc=weights["encoder.bias"],
            W_dec=weights["W_dec"],
            b_dec=weights["b_dec"],
            k=require_type(config["k"], int, "k", str(folder)),
            teacher_layer=_teacher_layer(hookpoint, str(folder)),
        )


# OpenAI


def _from_openai(path: Path, max_active: int) -> SparseAutoencoder:
    with _reading(path, "an SAE in OpenAI's format"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
        require_tensors(state, OPENAI_TENSORS, OPENAI_OTHERS, f"the SAE in {path}", "tied decoders are not supported")
        # As in OpenAI's loader, a missing activation means ReLU, and only TopK comes with the normalization.
        activation, settings = state.get("activation", "ReLU"), state.get("activation_state_dict") or {}
        after = settings.get("postact_fn", "ReLU")
        if activation not in ("TopK", "ReLU") or after != "ReLU":
            raise InputError(
                f"the SAE in {path} has the activation {activation!r} followed by {after!r}; "
                "expected 'TopK' or 'ReLU', followed by 'ReLU'"
            )
        top = activation == "TopK"
        return SparseAutoencoder(
            W_enc=state["encoder.weight"].T,
            b_enc=state["latent_bias"],
            W_dec=state["decoder.weight"].T,
            b_dec=state["pre_bias"],
            k=require_type(settings["k"], int, "k", str(path)) if top else None,
            threshold=None if top else torch.zeros_like(state["latent_bias"]),
            max_active=max_active,
            normalization="layer_norm" if top else "none",
        )


def _teacher_layer(hook: str | None, where: str) -> int | None:
    """Return the 0-based block whose output `hook` names; None for an unknown hook name."""
    match = BLOCK.fullmatch(hook or "")
    if match is None and not re.match(r"hook_|ln_final", hook or ""):
        return None
    layer, within = (int(match[1]), match["within"]) if match else (-1, None)
    if within == "hook_resid_pre":
        layer, within = layer - 1, None
    if layer < 0 or within not in (None, "hook_resid_post"):
        raise InputError(
            f"the SAE in {where} reads {hook}, but only the residual stream between blocks is supported: use an SAE "
            "of hook_resid_post, or of hook_resid_pre from block 1 on"
        )
    return layer


@contextmanager
def _reading(what: str | Path, expected: str) -> Iterator[None]:
    """Convert the errors that readers raise for truncated or unexpected files to an `InputError` of one line."""
    try:
        yield
    except InputError as error:
        raise error if str(what) in str(error) else InputError(f"{what}: {error}") from None
    except Exception as error:
        raise InputError(f"{what} is not {expected}: {type(error).__name__}: {error_message(error)}") from None


def _nothing_at(path: Path) -> InputError:
    inside = [each.parent.relative_to(path) for depth in ("*", "*/*") for each in path.glob(f"{depth}/{CONFIG}")]
    if inside:
        names = sorted(map(str, inside), key=lambda name: ([int(n) for n in re.findall(r"\d+", name)], name))
        return InputError(f"{path} holds several SAEs; give the folder of one: {listed(names)}")
    return InputError(
        f"no SAE at {str(path)!r}: expected a SAELens or sparsify folder (with {CONFIG}), a .pt file in "
        f"OpenAI's format, or {REGISTRY}RELEASE/SAE_ID"
    )
