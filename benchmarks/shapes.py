"""Sizes of the benchmarked models, and functions that build them with random weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cocomix import CoCoMixConfig, CoCoMixForCausalLM
from cocomix.concepts.attribution import ConceptExtractor
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.teacher import compile_blocks

ACTIVE_LATENTS = 32
LABELS_PER_TOKEN = 4


@dataclass(frozen=True)
class Decoder:
    """Hidden size, number of blocks and number of attention heads of a GPT-2."""

    width: int
    blocks: int
    heads: int


@dataclass(frozen=True)
class Shape:
    """Sizes of student, teacher, SAE and batch.

    Attributes:
        concepts: C, number of SAE latents.
        active_concepts: K, concepts that the student mixes per token.
    """

    student: Decoder
    teacher: Decoder
    teacher_layer: int
    vocabulary: int
    concepts: int
    batch: int
    block_size: int
    insert_layer: int = 3
    active_concepts: int = 32

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.block_size


SHAPES = {
    "tiny": Shape(Decoder(32, 4, 2), Decoder(32, 2, 2), 0, 512, 256, 2, 64, insert_layer=2, active_concepts=8),
    "small": Shape(Decoder(256, 6, 4), Decoder(256, 6, 4), 3, 8_192, 8_192, 2, 512),
    "69m": Shape(Decoder(512, 8, 8), Decoder(768, 12, 12), 5, 50_257, 32_768, 1, 512),
    "69m-gpu": Shape(Decoder(512, 8, 8), Decoder(768, 12, 12), 5, 50_257, 32_768, 16, 1_024),
    "124m-gpu": Shape(Decoder(768, 12, 12), Decoder(768, 12, 12), 5, 50_257, 32_768, 16, 1_024, insert_layer=4),
}
"""`tiny` is for tests; `69m-gpu` is the 69M recipe's shape with a batch that fills a GPU; `124m-gpu` is GPT-2 small."""


def decoder_config(decoder: Decoder, shape: Shape, positions: int | None = None) -> GPT2Config:
    """Configure a GPT-2 without dropout."""
    return GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=positions or shape.block_size,
        n_embd=decoder.width,
        n_layer=decoder.blocks,
        n_head=decoder.heads,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


def plain(shape: Shape, positions: int | None = None) -> GPT2LMHeadModel:
    """Build Transformers' GPT-2 with the student's width and depth."""
    return GPT2LMHeadModel(decoder_config(shape.student, shape, positions))


def cocomix_model(shape: Shape, positions: int | None = None, **settings: object) -> CoCoMixForCausalLM:
    """Build a CoCoMix model with the published settings, which `settings` override."""
    chosen = {
        "insert_layer": shape.insert_layer,
        "num_concepts": shape.concepts,
        "num_active_concepts": shape.active_concepts,
        "concept_slot": "concept",
        "concept_loss_weight": 0.1,
    } | settings
    return CoCoMixForCausalLM(CoCoMixConfig(decoder_config(shape.student, shape, positions), **chosen))


def teacher(shape: Shape) -> GPT2LMHeadModel:
    """Build a teacher with the student's vocabulary."""
    return GPT2LMHeadModel(decoder_config(shape.teacher, shape))


def extractor(
    shape: Shape,
    device: torch.device,
    selection: str = "attribution",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> ConceptExtractor:
    """Build a teacher and an SAE, with weights of `dtype`, that label."""
    width, concepts = shape.teacher.width, shape.concepts
    W_enc = torch.randn(width, concepts) / width**0.5
    sae = SparseAutoencoder(
        W_enc=W_enc,
        b_enc=torch.zeros(concepts),
        W_dec=W_enc.T.contiguous(),
        b_dec=torch.zeros(width),
        k=min(ACTIVE_LATENTS, concepts),
        normalization="layer_norm",
        teacher_layer=shape.teacher_layer,
    )
    reader = teacher(shape).to(device, dtype)
    if compiled:
        compile_blocks(reader)
    return ConceptExtractor(reader, sae.to(dtype), shape.teacher_layer, LABELS_PER_TOKEN, selection, compiled)


def random_batch(shape: Shape, device: torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw random tokens, and concept labels for all tokens but the last of each block."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape.vocabulary, (shape.batch, shape.block_size), generator=draw)
    labels = torch.randint(shape.concepts, (*ids.shape, LABELS_PER_TOKEN), generator=draw)
    labels[:, -1] = -100
    return {"input_ids": ids.to(device), "concept_ids": labels.to(device)}
