"""Text to tokens: train a byte-level tokenizer or load one, and encode text as nothing but text."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from cocomix.data.pieces import decoded
from cocomix.data.records import reason
from cocomix.errors import InputError, UnreachableError
from cocomix.settings import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # all bytes and the end-of-text token

# Blanks, line ends, several scripts, an unassigned sign, and the special token spelt out.
_PROBE = "The  quick\tbrown fox's 3.14\r\n\n    def f(x): return x\x00 naïve e\u0301 Ω 北京 🙂 " + END_OF_TEXT


@dataclass
class TokenizerConfig:
    """The recipe's section `tokenizer`.

    Attributes:
        source: a Hugging Face tokenizer folder or hub id. Without it, one is trained on the corpus.
        vocab_size: tokens of the trained one, end-of-text included; at least 257. Beside a `source`,
            what `cocomix plan` counts with where that cannot be reached.
    """

    source: str | None = None
    vocab_size: Vocabulary = 4096


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens: end-of-text (id 0), all bytes, merges.

    Every text survives encoding and decoding unchanged. The same texts give the same tokenizer.
    The vocabulary is smaller than asked where the texts have too few pairs that occur twice.
    End-of-text also stands for padding: packed blocks have none, and generation masks it.

    Raises `InputError` if `vocab_size` leaves no room for all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"vocab_size is {vocab_size}: give at least {MIN_VOCAB_SIZE}, for the 256 bytes and end-of-text"
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
    bpe.train_from_iterator(tqdm(texts, desc="Training the tokenizer", unit=" documents", disable=None), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder `source`, or with that Hugging Face hub id.

    Raises `InputError` if it does not load or has no end-of-text token.
    """
    from transformers import AutoTokenizer

    if Path(source).is_file():
        raise InputError(f"tokenizer {source!r} is a file: give the folder that holds it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a malformed tokenizer.json raises a bare Exception, other faults many types
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise InputError(
                f"tokenizer {source!r} brings its own code, which cocomix does not run; give one of a type that "
                "Transformers knows"
            ) from error
        elsewhere = isinstance(error, OSError) and not Path(source).exists()
        raise (UnreachableError if elsewhere else InputError)(
            f"tokenizer {source!r} does not load ({type(error).__name__}: {reason(error)}): "
            "give a folder made by save_pretrained, or a Hugging Face hub id"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {source!r} has no end-of-text token, which separates documents: "
            "set its eos_token and save it again"
        )
    return tokenizer


def require_unicode(text: str) -> None:
    """Raise `InputError` for a text that is not valid Unicode, which no tokenizer reads.

    Such are an argument of the command line that is not UTF-8, and half of a surrogate pair that a browser sends.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not valid Unicode: its character {error.start} is {text[error.start]!r}, half of a surrogate "
            "pair or a byte that is not UTF-8; give the text in UTF-8"
        ) from error


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, with nothing added before or after.

    A text that spells a special token is encoded as the characters that it is: documents end where
    they end, not where their text says so.
    """
    return _encode_as_text(tokenizer, texts)["input_ids"]


def changed_characters(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], encoded: Sequence[list[int]]) -> int:
    """Count the characters of some texts that their tokens do not give back, such as those of unknown words.

    Each character is counted wherever it stands: of a text whose characters are only reordered, one counts.
    """
    changed = 0
    for text, ids in zip(texts, encoded, strict=True):
        if (restored := decoded(tokenizer, ids)) != text:
            before, after = Counter(text), Counter(restored)
            changed += min(len(text), max(1, (before - after).total(), (after - before).total()))
    return changed


class EncodedText(NamedTuple):
    """The tokens of a text, and where they end in it."""

    ids: np.ndarray
    """(n,) int64."""
    ends: np.ndarray
    """(n,) int64, not decreasing: token i ends before character ends[i] of the text, which is 1 or more. The
    tokens that share the bytes of one character all end behind it."""


def encode_with_ends(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[EncodedText]:
    """The tokens that `encode_documents` gives, and where each ends; the tokenizer must be a fast one."""
    with _whole_offsets(tokenizer):
        encoded = _encode_as_text(tokenizer, texts, return_offsets_mapping=True)
    return [
        EncodedText(np.array(ids, np.int64), _ends(offsets))
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _encode_as_text(tokenizer: PreTrainedTokenizerBase, texts: list[str], **wanted: bool) -> Any:
    try:
        return tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about documents longer than the model's context
            **wanted,
        )
    except Exception as error:  # a bare one, such as that of a vocabulary without its unknown token
        raise InputError(
            f"the tokenizer cannot encode a text ({reason(error)}): use another one, such as a byte-level tokenizer"
        ) from error


@contextmanager
def _whole_offsets(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """While open, offsets include the blanks of a token, which the last step of some tokenizers trims off."""
    from tokenizers import processors

    backend = tokenizer.backend_tokenizer
    processor = backend.post_processor
    if processor is None:
        yield
        return
    backend.post_processor = processors.ByteLevel(trim_offsets=False)  # does nothing
    try:
        yield
    finally:
        backend.post_processor = processor


def _ends(offsets: list[tuple[int, int]]) -> np.ndarray:
    ends = np.array(offsets, np.int64).reshape(-1, 2)[:, 1]
    # A token that stands for no character, such as a blank put before the text, belongs to the next one.
    return np.maximum.accumulate(np.maximum(ends, 1))


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether the two have the same vocabulary and give the same tokens on a probe text."""
    return a.get_vocab() == b.get_vocab() and encode_documents(a, [_PROBE]) == encode_documents(b, [_PROBE])


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id, which can exceed the number of tokens where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides the tokens: vocabulary, end-of-text and the serialised pipeline.

    Equal before and after saving and loading, and whatever was encoded in between.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers written in Python have none
    pipeline = json.loads(backend.to_str()) if backend is not None else {}
    # Padding and truncation are left behind by the last call, and play no part in encode_documents.
    pipeline = {key: value for key, value in pipeline.items() if key not in ("padding", "truncation")}
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, pipeline]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
