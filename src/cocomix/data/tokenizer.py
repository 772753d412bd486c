"""Train or load a tokenizer, and encode text without interpreting special tokens in it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cocomix.common.console import progress_bar
from cocomix.common.errors import InputError, UnreachableError, error_message
from cocomix.common.settings import Vocabulary
from cocomix.data.long_texts import PIECE, pieces
from cocomix.data.pieces import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # all bytes and the end-of-text token

# Spaces, line breaks, several scripts, an unassigned character, and a spelled-out special token.
_PROBE = "The  quick\tbrown fox's 3.14\r\n\n    def f(x): return x\x00 naïve e\u0301 Ω 北京 🙂 " + END_OF_TEXT


@dataclass
class TokenizerConfig:
    """The `tokenizer` section of a recipe.

    Attributes:
        source: folder or Hub id of a Hugging Face tokenizer. By default, one is trained on the corpus.
        vocab_size: number of tokens of the trained tokenizer, including end-of-text; at least 257. With a `source`,
            `cocomix plan` uses this if the source cannot be reached.
    """

    source: str | None = None
    vocab_size: Vocabulary = 4096


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens: end-of-text (id 0), all bytes, and merges.

    Encoding and decoding restores every text. The same texts give the same tokenizer. The vocabulary is smaller than
    `vocab_size` if the texts have too few pairs that occur twice. End-of-text is also the padding token: packed blocks
    have no padding, and generation masks it.

    Raises:
        InputError: `vocab_size` leaves no room for all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"vocab_size is {vocab_size}; expected at least {MIN_VOCAB_SIZE}, for the 256 bytes and end-of-text"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = progress_bar(texts, desc="Training the tokenizer", unit=" documents")
    bpe.train_from_iterator(chain.from_iterable(map(pieces, texts)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in the folder `source`, or with this Hugging Face Hub id.

    Raises:
        InputError: it does not load, or has no end-of-text token.
    """
    from transformers import AutoTokenizer

    if Path(source).is_file():
        raise InputError(f"tokenizer {source!r} is a file: give its folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a malformed tokenizer.json raises a bare Exception, other errors many types
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise InputError(
                f"tokenizer {source!r} requires custom code, which cocomix does not run; give one of a type that "
                "Transformers supports"
            ) from error
        elsewhere = isinstance(error, OSError) and not Path(source).exists()
        raise (UnreachableError if elsewhere else InputError)(
            f"tokenizer {source!r} does not load ({type(error).__name__}: {error_message(error)}): "
            "give a folder written by save_pretrained, or a Hugging Face hub id"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {source!r} has no end-of-text token, which is needed to separate documents: "
            "set its eos_token and save it again"
        )
    return tokenizer


def require_unicode(text: str) -> None:
    """Raise `InputError` for a text that is not valid Unicode, which no tokenizer can encode.

    Examples are command-line arguments that are not UTF-8, and half of a surrogate pair from a browser.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not valid Unicode: its character {error.start} is {text[error.start]!r}, half of a surrogate "
            "pair or a byte that is not UTF-8; give the text in UTF-8"
        ) from error


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Encode texts to token ids, without adding special tokens.

    A special token that is spelled out in a text is encoded as plain characters, so a text cannot end a document.
    Long texts are encoded piece by piece, in bounded memory.
    """
    short = [text for text in texts if len(text) <= PIECE]
    encoded = iter(_encode_as_text(tokenizer, short)["input_ids"] if short else [])
    return [next(encoded) if len(text) <= PIECE else _encode_long(tokenizer, text) for text in texts]


def _encode_long(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    def encode(piece: str) -> list[int]:
        return _encode_as_text(tokenizer, [piece])["input_ids"][0]

    return list(chain.from_iterable(map(encode, pieces(text, encode))))


def changed_characters(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], encoded: Sequence[list[int]]) -> int:
    """Count the characters of texts that decoding their tokens does not restore, such as those of unknown words.

    Characters are compared regardless of order; a text whose characters are only reordered counts as one change.
    """
    changed = 0
    for text, ids in zip(texts, encoded, strict=True):
        if (restored := decoded(tokenizer, ids)) != text:
            before, after = Counter(text), Counter(restored)
            changed += min(len(text), max(1, (before - after).total(), (after - before).total()))
    return changed


class EncodedText(NamedTuple):
    """The tokens of a text and their ends."""

    ids: np.ndarray
    """(n,) int64."""
    ends: np.ndarray
    """(n,) int64, nondecreasing and at least 1: token i ends before character ends[i] of the text. Tokens that share
    the bytes of one character all end after it."""


def encode_with_ends(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[EncodedText]:
    """Encode texts as `encode_documents` does, with the end of each token; the tokenizer must be a fast one."""
    short = [text for text in texts if len(text) <= PIECE]
    with _untrimmed_offsets(tokenizer):
        encoded = iter(_with_ends(tokenizer, short))
        return [next(encoded) if len(text) <= PIECE else _long_with_ends(tokenizer, text) for text in texts]


def _with_ends(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[EncodedText]:
    encoded = _encode_as_text(tokenizer, texts, return_offsets_mapping=True) if texts else {}
    columns = encoded.get("input_ids", []), encoded.get("offset_mapping", [])
    return [EncodedText(np.array(ids, np.int64), _ends(offsets)) for ids, offsets in zip(*columns, strict=True)]


def _long_with_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> EncodedText:
    parts = pieces(text, lambda piece: encode_documents(tokenizer, [piece])[0])
    encoded = [_with_ends(tokenizer, [part])[0] for part in parts]
    starts = accumulate(map(len, parts[:-1]), initial=0)
    ends = [start + part.ends for start, part in zip(starts, encoded, strict=True)]
    return EncodedText(np.concatenate([part.ids for part in encoded]), np.concatenate(ends))


def _encode_as_text(tokenizer: PreTrainedTokenizerBase, texts: list[str], **wanted: bool) -> Any:
    try:
        return tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about documents that exceed the model's context
            **wanted,
        )
    except Exception as error:  # bare exceptions, such as for a vocabulary without its unknown token
        raise InputError(
            f"the tokenizer cannot encode a text ({error_message(error)}): use another, such as a byte-level tokenizer"
        ) from error


@contextmanager
def _untrimmed_offsets(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """While open, include a token's spaces in its offsets; the post-processor of some tokenizers trims them."""
    from tokenizers import processors

    backend = tokenizer.backend_tokenizer
    processor = backend.post_processor
    if processor is None:
        yield
        return
    backend.post_processor = processors.ByteLevel(trim_offsets=False)  # a no-op
    try:
        yield
    finally:
        backend.post_processor = processor


def _ends(offsets: list[tuple[int, int]]) -> np.ndarray:
    ends = np.array(offsets, np.int64).reshape(-1, 2)[:, 1]
    # A token without characters, such as a space added before the text, belongs to the next one.
    return np.maximum.accumulate(np.maximum(ends, 1))


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Check whether two tokenizers have the same vocabulary and encode a probe text alike."""
    return a.get_vocab() == b.get_vocab() and encode_documents(a, [_PROBE]) == encode_documents(b, [_PROBE])


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the largest token id, which exceeds the number of tokens if ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of everything that determines the tokens: vocabulary, end-of-text, and serialized pipeline.

    It does not change by saving and loading, or by encoding texts.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers written in Python have none
    pipeline = json.loads(backend.to_str()) if backend is not None else {}
    # Padding and truncation are left over from the last call, and do not affect encode_documents.
    pipeline = {key: value for key, value in pipeline.items() if key not in ("padding", "truncation")}
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, pipeline]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
