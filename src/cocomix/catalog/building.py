"""Build the concept catalog: what activates each concept, which tokens it promotes, and how often it is a label.

C concepts (SAE latents), n contexts kept per concept, w tokens per context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cocomix.catalog.activity import read_activity
from cocomix.catalog.contexts import Windows, read_windows
from cocomix.catalog.naming import default_name
from cocomix.catalog.rows import (
    CATALOG_FILE,
    INFO_FILE,
    PROMOTED_TOKENS,
    ROWS_PER_GROUP,
    SCHEMA,
    CatalogInfo,
    Context,
    write_rows,
)
from cocomix.common import files
from cocomix.common.console import progress_bar
from cocomix.common.settings import Count, Range, Vocabulary
from cocomix.concepts.reading import TeacherReader
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.teacher import freeze
from cocomix.data.pieces import decode_around, decoded
from cocomix.data.tokenizer import vocabulary_size
from cocomix.models.backbones import final_norm_name

LOGITS_BUFFER_BYTES = 128 * 2**20
"""Upper bound for the logits of a chunk of decoder directions, (chunk, V)."""


@dataclass
class CatalogConfig:
    """The `catalog` section of a recipe.

    Args:
        contexts: maximum number of contexts per concept: the places where it is most active, one per block.
        context_tokens: tokens shown before such a place; half as many are shown after it.
        tokens: number of promoted and of suppressed tokens per concept.
        max_blocks: number of training blocks to read; all by default.
    """

    contexts: Annotated[int, Range(1, 1000)] = 10
    context_tokens: Annotated[int, Range(1, 1024)] = 16
    tokens: Vocabulary = 8
    max_blocks: Count | None = None


class Effects(NamedTuple):
    """The t tokens that each of m directions promotes and suppresses most."""

    promoted: torch.return_types.topk
    """values, indices (m, t), in descending order of the logit."""
    suppressed: torch.return_types.topk
    """values, indices (m, t), in ascending order of the logit."""


def _final_norm(teacher: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return the teacher's final norm, or the identity if it does not have exactly one."""
    try:
        return getattr(teacher.base_model, final_norm_name(teacher.base_model))
    except ValueError:
        return lambda x: x


@torch.no_grad()
def token_effects(teacher: PreTrainedModel, directions: Tensor, tokens: int, vocab_size: int) -> list[Effects]:
    """Project directions (m, d) of the residual stream through the teacher's unembedding, in chunks.

    The logits are those of a last residual stream that consists of the direction alone, scaled to a mean square of 1,
    without biases and soft caps. The final norm is applied because its gain, and the centering of a LayerNorm,
    determine which directions matter. Its bias does not depend on the direction and is removed by
    norm(w) − norm(−w) = 2 · gain · ŵ, which holds for LayerNorm and for every form of RMSNorm. The blocks after the
    tap are ignored, so these are direct effects only. Logits are computed in the unembedding's precision; ids from
    `vocab_size` on belong to no token and are excluded.
    """
    norm, unembedding = _final_norm(teacher), teacher.get_output_embeddings().weight[:vocab_size]

    def effects(part: Tensor) -> Effects:  # a function, so that its logits are freed before the next chunk
        read = (norm(part) - norm(-part)) / 2
        logits = F.linear(read.to(unembedding.dtype), unembedding)
        return Effects(logits.topk(tokens), logits.topk(tokens, largest=False))

    directions = directions.to(unembedding)
    scale = directions.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(directions.dtype).tiny)
    chunk = max(1, LOGITS_BUFFER_BYTES // (len(unembedding) * unembedding.element_size()))
    return [effects(part) for part in (directions / scale).split(chunk)]


def build_catalog(
    teacher: PreTrainedModel,
    sae: SparseAutoencoder,
    teacher_layer: int,
    reader: TeacherReader,
    label_counts: np.ndarray,
    labelled_tokens: int,
    config: CatalogConfig,
    blocks_per_batch: int,
    folder: Path,
) -> CatalogInfo:
    """Write `catalog.parquet`, one row per concept, and `catalog.json` into `folder`.

    The teacher reads each block once; the blocks of the kept contexts are then fetched again for their text.
    Memory: O(C · n · w) numbers (50 MB for 32,768 concepts and the defaults), one batch, and the text of
    `ROWS_PER_GROUP` concepts. The result does not depend on `blocks_per_batch`, except for the teacher's rounding.

    Args:
        teacher: frozen by this function.
        sae: of the residual stream after block `teacher_layer`.
        teacher_layer: 0-based.
        reader: the training text as the teacher reads it.
        label_counts: (C,) int64 how often each concept is a label.
        labelled_tokens: number of tokens of the labeled corpus.
        config: sizes of the catalog.
        blocks_per_batch: blocks that the teacher reads at once.
        folder: existing folder; each file is written atomically.
    """
    assert label_counts.shape == (sae.d_sae,)
    sae, blocks = sae.to(freeze(teacher).device), min(len(reader), config.max_blocks or len(reader))
    activity = read_activity(teacher, sae, teacher_layer, reader, blocks, blocks_per_batch, config.contexts)
    block, position = activity.block.cpu().numpy(), activity.position.cpu().numpy()
    windows = read_windows(reader, block, position, config.context_tokens, config.context_tokens // 2)
    numbers = pa.table(
        {
            "concept_id": np.arange(sae.d_sae, dtype=np.int32),
            "frequency": (activity.count.double() / max(1, activity.tokens)).cpu().numpy(),
            "mean_activation": (activity.total / activity.count.clamp(min=1)).cpu().numpy(),
            "max_activation": activity.activation[:, 0].double().cpu().numpy(),
            "label_count": label_counts,
            "label_share": label_counts / max(1, labelled_tokens),
        }
    )

    def rows() -> Iterator[pa.Table]:
        for start in progress_bar(range(0, sae.d_sae, ROWS_PER_GROUP), desc="catalog, texts", unit="group"):
            group = slice(start, start + ROWS_PER_GROUP)
            columns = _token_columns(teacher, sae.W_dec[group], config.tokens, reader.tokenizer)
            places = Windows(windows.ids[group], windows.document[group])
            strength = activity.activation[group].cpu().numpy()
            contexts = _contexts(reader, places, strength, block[group], position[group], config.context_tokens)
            part = numbers.slice(start, ROWS_PER_GROUP).to_pydict() | columns | {"contexts": contexts}
            yield pa.table(part, schema=SCHEMA)

    write_rows(folder / CATALOG_FILE, rows())
    info = CatalogInfo(
        num_concepts=sae.d_sae,
        sae=sae.fingerprint(),
        active_concepts=int((activity.count > 0).sum()),
        tokens=activity.tokens,
        blocks=blocks,
        labelled_tokens=labelled_tokens,
        teacher_layer=teacher_layer,
        contexts=config.contexts,
        context_tokens=config.context_tokens,
    )
    files.write_json(folder / INFO_FILE, asdict(info))
    return info


def _token_columns(
    teacher: PreTrainedModel, directions: Tensor, tokens: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Any]]:
    """Compute the columns of promoted and suppressed tokens, and the default names."""
    size = min(vocabulary_size(tokenizer), len(teacher.get_output_embeddings().weight))
    effects = token_effects(teacher, directions, min(tokens, size), size)
    columns: dict[str, list[Any]] = {}
    for side in Effects._fields:
        ids = torch.cat([getattr(part, side).indices for part in effects]).tolist()
        columns[side] = [[decoded(tokenizer, [token]) for token in row] for row in ids]
        columns[f"{side}_logits"] = torch.cat([getattr(part, side).values for part in effects]).tolist()
    names = [default_name(promoted) for promoted in columns["promoted"]]
    return columns | {"name": names, "name_source": [PROMOTED_TOKENS] * len(names)}


def find_contexts(
    teacher: PreTrainedModel,
    sae: SparseAutoencoder,
    teacher_layer: int,
    reader: TeacherReader,
    concepts: Sequence[int],
    blocks: int,
    blocks_per_batch: int,
    config: CatalogConfig,
) -> list[list[Context]]:
    """Find where concepts are most active in the first `blocks` blocks, strongest first; needs no catalog."""
    activity = read_activity(teacher, sae, teacher_layer, reader, blocks, blocks_per_batch, config.contexts)
    found = (each[list(concepts)].cpu().numpy() for each in (activity.activation, activity.block, activity.position))
    activation, block, position = found
    windows = read_windows(reader, block, position, config.context_tokens, config.context_tokens // 2)
    rows = _contexts(reader, windows, activation, block, position, config.context_tokens)
    return [[Context(**context) for context in row] for row in rows]


def promoted_tokens(
    teacher: PreTrainedModel, directions: Tensor, tokens: int, tokenizer: PreTrainedTokenizerBase
) -> list[list[str]]:
    """Return the tokens that each direction promotes most, strongest first, as in a catalog."""
    columns = _token_columns(teacher, directions, tokens, tokenizer)
    return columns["promoted"]


def _contexts(
    reader: TeacherReader,
    windows: Windows,
    activation: np.ndarray,
    block: np.ndarray,
    position: np.ndarray,
    before: int,
) -> list[list[dict[str, Any]]]:
    """Decode the contexts of m concepts.

    Args:
        reader: provides the tokenizer and the sources of documents.
        windows: the tokens around each place.
        activation, block, position: (m, n); `block` is −1 where there is no place.
        before: index, within a window (w,), of the token at which the concept is active.
    """
    sources: dict[int, str] = {-1: ""}
    contexts: list[list[dict[str, Any]]] = [[] for _ in block]
    for row, slot in np.argwhere(block >= 0).tolist():
        window, document = windows.ids[row, slot], int(windows.document[row, slot])
        if document not in sources:
            sources[document] = reader.source(document)
        left = int((window[:before] >= 0).sum())
        pieces = decode_around(lambda ids: decoded(reader.tokenizer, ids), window[window >= 0].tolist(), left)
        context = Context(
            *pieces,
            activation=float(activation[row, slot]),
            source=sources[document],
            block=int(block[row, slot]),
            position=int(position[row, slot]),
        )
        contexts[row].append(vars(context))
    return contexts
