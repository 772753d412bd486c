"""The fast code equals slow code that reads like DESIGN section 2: loops over tokens, dense vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cocomix import CoCoMixConfig
from cocomix.concepts.attribution import SELECTIONS, ConceptExtractor, attribution_scores, select_labels
from cocomix.concepts.sae import Latents, SparseAutoencoder
from cocomix.concepts.teacher import tapped_residual
from cocomix.models.losses import concept_loss, token_loss
from cocomix.models.mixer import ConceptMixer

TOLERANCE = 1e-10
MIXINGS = [("interleave", "concept"), ("interleave", "residual"), ("add", "concept"), ("none", "concept")]


# The mixer


def plain_mixer(h: Tensor, mixer: ConceptMixer) -> tuple[Tensor, Tensor]:
    """Input of the upper blocks and concept logits, one token after the other."""
    sequences, logits = [], []
    for sequence in h:
        rows = []
        for x in sequence:
            width = x.numel()
            mean = x.sum() / width
            std = (((x - mean) ** 2).sum() / (width - 1)).sqrt()
            n = (x - mean) / (std + 1e-5) - mixer.pre_bias
            z = mixer.predict.weight @ n + mixer.predict.bias
            logits.append(z)
            if mixer.mixing == "none":
                rows.append(x)
                continue
            chosen = sorted(range(z.numel()), key=lambda i: -z[i].item())[: mixer.num_active_concepts]
            one_hot = F.one_hot(torch.tensor(chosen), z.numel()).sum(0).to(z.dtype)
            kept = z * one_hot  # (C,), dense
            c = (kept @ mixer.compress_weight + mixer.compress_bias + mixer.pre_bias) * std + mean
            if mixer.mixing == "add":
                rows.append(x + c)
            else:
                rows += [x, c if mixer.concept_slot == "concept" else c + x - mean]
        sequences.append(torch.stack(rows))
    return torch.stack(sequences), torch.stack(logits).view(*h.shape[:2], -1)


def random_mixer(backbone_config, redraw, mixing: str, concept_slot: str) -> ConceptMixer:
    config = CoCoMixConfig(
        backbone_config=backbone_config("gpt2"),
        num_concepts=24,
        num_active_concepts=6,
        insert_layer=1,
        mixing=mixing,
        concept_slot=concept_slot,
    )
    mixer = ConceptMixer(config).double()
    redraw(mixer)
    return mixer


@pytest.mark.parametrize(("mixing", "concept_slot"), MIXINGS)
def test_mixer_and_all_its_gradients(mixing, concept_slot, backbone_config, redraw, relative_error):
    mixer = random_mixer(backbone_config, redraw, mixing, concept_slot)
    h = torch.randn(2, 5, 32, dtype=torch.float64) * 3 + 1
    h.requires_grad_()
    wanted, wanted_logits = plain_mixer(h, mixer)
    found = mixer(h)
    assert relative_error(found.hidden_states, wanted) < TOLERANCE
    assert relative_error(found.predicted, wanted_logits) < TOLERANCE

    # The gradients of one random direction in all outputs.
    along, along_logits = torch.randn_like(wanted), torch.randn_like(wanted_logits)
    inputs = {"h": h, **dict(mixer.named_parameters())}

    def gradients(hidden_states: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((hidden_states * along).sum() + (logits * along_logits).sum(), list(inputs.values()))

    of_wanted, of_found = gradients(wanted, wanted_logits), gradients(found.hidden_states, found.predicted)
    for name, gradient, expected in zip(inputs, of_found, of_wanted, strict=True):
        assert relative_error(gradient, expected) < TOLERANCE, name


def test_the_mixer_keeps_negative_logits(backbone_config, redraw, relative_error):
    mixer = random_mixer(backbone_config, redraw, "interleave", "concept")
    with torch.no_grad():
        mixer.predict.bias -= 20.0
    h = torch.randn(1, 3, 32, dtype=torch.float64)
    wanted, logits = plain_mixer(h, mixer)
    assert logits.max() < 0
    assert relative_error(mixer(h).hidden_states, wanted) < TOLERANCE


# The model


@pytest.mark.parametrize(
    ("kind", "settings", "slots"),
    [
        ("gpt2", {"mixing": "interleave"}, None),
        ("llama", {"mixing": "interleave"}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("llama", {"concept_slot": "residual", "slot_positions": "repeat"}, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
        ("llama", {"mixing": "add"}, [0, 1, 2, 3, 4]),
        ("llama", {"mixing": "none"}, [0, 1, 2, 3, 4]),
    ],
    ids=["gpt2", "interleaved", "repeat", "add", "none"],
)
@torch.no_grad()
def test_a_token_is_predicted_from_its_last_slot_above_the_mixer(kind, settings, slots, random_model, relative_error):
    model, ids = random_model(kind, **settings), torch.randint(53, (2, 5))
    h = model.lower(input_ids=ids, use_cache=False).last_hidden_state
    mixed, concept_logits = plain_mixer(h, model.mixer)
    h = model.upper(
        inputs_embeds=mixed,
        attention_mask=torch.ones(mixed.shape[:2]),
        position_ids=None if slots is None else torch.tensor([slots]),
        use_cache=False,
    ).last_hidden_state
    read = [1, 3, 5, 7, 9] if model.config.mixing == "interleave" else [0, 1, 2, 3, 4]
    wanted = torch.stack([h[:, slot] @ model.lm_head.weight.T for slot in read], dim=1)
    out = model(ids, output_concepts=True)
    assert relative_error(out.logits, wanted) < TOLERANCE
    assert relative_error(out.concept_logits, concept_logits) < TOLERANCE


# The losses


def plain_token_losses(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """The cross-entropy of each token's logits against the token after it, where that is a target."""
    return [
        F.cross_entropy(logits[b, t][None], labels[b, t + 1][None])
        for b in range(labels.shape[0])
        for t in range(labels.shape[1] - 1)
        if labels[b, t + 1] != -100
    ]


def plain_concept_loss(z: Tensor, concept_ids: Tensor) -> Tensor:
    """The cross-entropies of each labeled token's labels, averaged over its labels, then over the tokens."""
    of_tokens = []
    for logits, labels in zip(z.flatten(0, 1), concept_ids.flatten(0, 1), strict=True):
        entropies = [F.cross_entropy(logits[None], label[None]) for label in labels if label != -100]
        if entropies:
            of_tokens.append(sum(entropies) / len(entropies))
    return sum(of_tokens) / len(of_tokens)


def distinct_labels(batch: int, tokens: int, per_token: int, num_concepts: int) -> Tensor:
    return torch.rand(batch, tokens, num_concepts).topk(per_token).indices


@pytest.mark.parametrize("gaps", ["every slot labelled", "empty slots", "unlabeled tokens"])
def test_concept_loss_is_the_mean_of_separate_cross_entropies(gaps, relative_error):
    z = torch.randn(2, 5, 17, dtype=torch.float64, requires_grad=True)
    concept_ids = distinct_labels(2, 5, 3, 17)
    if gaps != "every slot labelled":
        concept_ids[0, 1, 2] = concept_ids[1, 0, 0] = -100
    if gaps == "unlabeled tokens":
        concept_ids[:, -1] = concept_ids[0, 2] = -100
    found, wanted = concept_loss(z, concept_ids), plain_concept_loss(z, concept_ids)
    assert relative_error(found, wanted) < TOLERANCE
    assert relative_error(torch.autograd.grad(found, z)[0], torch.autograd.grad(wanted, z)[0]) < TOLERANCE


def test_concept_loss_with_every_slot_labeled_is_the_published_sum_over_labels(relative_error):
    z, concept_ids = torch.randn(2, 5, 17, dtype=torch.float64), distinct_labels(2, 5, 4, 17)
    published = sum(F.cross_entropy(z.flatten(0, 1), concept_ids[..., a].flatten()) for a in range(4)) / 4
    assert relative_error(concept_loss(z, concept_ids), published) < TOLERANCE


def test_token_loss_is_the_mean_over_tokens_with_a_target(relative_error):
    logits, labels = torch.randn(2, 6, 11, dtype=torch.float64), torch.randint(11, (2, 6))
    labels[0, 3] = labels[1, 4:] = -100
    of_tokens = plain_token_losses(logits, labels)
    assert len(of_tokens) == 7
    assert relative_error(token_loss(logits, labels), sum(of_tokens) / len(of_tokens)) < TOLERANCE


# The sparse autoencoder


def plain_encoding(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense latents (d_sae,) and reconstruction (d_in,) of one activation x (d_in,)."""
    mean, std = x.new_zeros(()), x.new_ones(())
    n = x
    if sae.normalization == "layer_norm":
        mean = x.sum() / x.numel()
        std = (((x - mean) ** 2).sum() / (x.numel() - 1)).sqrt()
        n = (x - mean) / (std + 1e-5)
    if sae.subtract_b_dec:
        n = n - sae.b_dec
    before = torch.stack([n @ sae.W_enc[:, i] + sae.b_enc[i] for i in range(sae.d_sae)])
    latents = torch.zeros_like(before)
    for i in sorted(range(sae.d_sae), key=lambda i: -before[i].item())[: sae.k]:
        latents[i] = max(before[i].item(), 0.0)
    reconstruction = sum(latents[i] * sae.W_dec[i] for i in range(sae.d_sae)) + sae.b_dec
    return latents, reconstruction * std + mean


def random_sae(width: int = 12, d_sae: int = 30, k: int = 6, shift: float = 0.0, **settings: Any) -> SparseAutoencoder:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64) * 0.5

    return SparseAutoencoder(
        W_enc=draw(width, d_sae),
        b_enc=draw(d_sae) + shift,
        W_dec=draw(d_sae, width),
        b_dec=draw(width),
        k=k,
        **settings,
    )


@pytest.mark.parametrize("shift", [0.0, -3.0], ids=["k active", "fewer active than k"])
@pytest.mark.parametrize("subtract_b_dec", [True, False])
@pytest.mark.parametrize("normalization", ["layer_norm", "none"])
def test_sae_encoding_and_reconstruction(normalization, subtract_b_dec, shift, relative_error):
    sae = random_sae(shift=shift, normalization=normalization, subtract_b_dec=subtract_b_dec)
    x = torch.randn(2, 7, 12, dtype=torch.float64) * 2 + 1
    latents, rebuilt = sae.encode(x), sae.reconstruct(x)
    assert latents.values.shape == latents.indices.shape == (2, 7, 6)
    found = torch.zeros(2, 7, 30, dtype=torch.float64).scatter(-1, latents.indices, latents.values)
    wanted = [plain_encoding(sae, row) for row in x.flatten(0, 1)]
    wanted_latents = torch.stack([w[0] for w in wanted]).view(2, 7, 30)
    assert relative_error(found, wanted_latents) < TOLERANCE
    assert relative_error(rebuilt, torch.stack([w[1] for w in wanted]).view(x.shape)) < TOLERANCE
    assert ((wanted_latents > 0).sum(-1) < 6).any() == (shift < 0)


# Attribution and the choice of labels


def plain_labels(
    latents: Tensor, gradient: Tensor, W_dec: Tensor, per_token: int, selection: str
) -> tuple[list[int], list[float]]:
    """Labels of one token from all its latents (d_sae,): the best first, padded with −100 and 0."""
    attribution = (latents * (W_dec @ gradient)).tolist()
    criterion = {
        "attribution": lambda i: attribution[i],
        "attribution_negative": lambda i: -attribution[i],
        "attribution_abs": lambda i: abs(attribution[i]),
        "activation": lambda i: latents[i].item(),
    }[selection]
    active = [i for i in range(len(latents)) if latents[i] > 0]
    best = sorted(active, key=criterion, reverse=True)[:per_token]
    missing = per_token - len(best)
    return best + [-100] * missing, [criterion(i) for i in best] + [0.0] * missing


@pytest.mark.parametrize("per_token", [1, 4, 8], ids=["one label", "fewer than k", "more than k"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_labels_are_the_best_active_latents(selection, per_token):
    d_sae, k, shape = 30, 6, (3, 8)
    values = torch.randn(*shape, k, dtype=torch.float64).relu()  # about half of them active
    latents = Latents(values, distinct_labels(*shape, k, d_sae))
    gradient = torch.randn(*shape, 12, dtype=torch.float64)
    W_dec = torch.randn(d_sae, 12, dtype=torch.float64)
    has_target = torch.rand(shape) < 0.8
    scores = attribution_scores(latents, gradient, W_dec)
    labels = select_labels(latents, scores, has_target, per_token, selection)

    dense = torch.zeros(*shape, d_sae, dtype=torch.float64).scatter(-1, latents.indices, values)
    assert has_target.any()
    assert not has_target.all()
    for b in range(shape[0]):
        for t in range(shape[1]):
            wanted_ids, wanted_scores = [-100] * per_token, [0.0] * per_token
            if has_target[b, t]:
                wanted_ids, wanted_scores = plain_labels(dense[b, t], gradient[b, t], W_dec, per_token, selection)
            assert labels.ids[b, t].tolist() == wanted_ids
            assert labels.scores[b, t].tolist() == pytest.approx(wanted_scores, abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_tap_gives_residual_and_gradient_of_an_ordinary_backward_pass(kind, layer, random_teacher, relative_error):
    teacher, ids = random_teacher(kind), torch.randint(53, (2, 9))
    out = teacher(input_ids=ids, output_hidden_states=True, use_cache=False)
    x = out.hidden_states[layer + 1]
    (gradient,) = torch.autograd.grad(sum(plain_token_losses(out.logits, ids)), x)
    tapped = tapped_residual(teacher.requires_grad_(False), ids, layer)
    assert relative_error(tapped.residual, x) < TOLERANCE
    assert relative_error(tapped.gradient, gradient) < TOLERANCE
    assert tapped.has_target.tolist() == [[True] * 8 + [False]] * 2


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_extractor_equals_dense_attribution_over_all_latents(selection, random_teacher):
    teacher, ids = random_teacher("gpt2"), torch.randint(53, (2, 9))
    sae = random_sae(width=32, d_sae=60, shift=-2.0, normalization="layer_norm")
    out = teacher(input_ids=ids, output_hidden_states=True, use_cache=False)
    x = out.hidden_states[2]
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (gradient,) = torch.autograd.grad(loss, x)

    labels = ConceptExtractor(teacher, sae, teacher_layer=1, labels_per_token=5, selection=selection)(ids)
    assert (labels.ids[:, -1] == -100).all()
    for b in range(2):
        for t in range(8):
            latents, _ = plain_encoding(sae, x[b, t].detach())
            wanted_ids, wanted_scores = plain_labels(latents, gradient[b, t], sae.W_dec, 5, selection)
            assert labels.ids[b, t].tolist() == wanted_ids
            assert labels.scores[b, t].tolist() == pytest.approx(wanted_scores, abs=TOLERANCE)
