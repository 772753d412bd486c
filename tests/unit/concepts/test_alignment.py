"""Labels moved between tokenizers: to the right token, and as they are where both tokenizers are the same."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cocomix.common.errors import InputError
from cocomix.concepts.alignment import OtherTokens, align_tokens
from cocomix.concepts.attribution import ConceptExtractor
from cocomix.concepts.reading import Passages, SameTokens
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.data.documents import DocumentTokens
from cocomix.data.tokenizer import encode_documents, encode_with_ends, tokenizer_fingerprint

END = "<|endoftext|>"
BYTES = {sign: byte for byte, sign in bytes_to_unicode().items()}

TEXTS = [
    "The cat sat on the mat, and  the rain\n   fell on the cat.\r\n\tThe end. ",
    "a",
    " ",
    "",
    "\n",
    "🙂🙂 naïve 北京 北京市 e\u0301e\u0301 \u1e69 s\u0323\u0307 👩‍👩‍👧🏳️‍🌈",
    f"a text{END}that spells {END}",
    END,
    "   def f(x):\r\n\t\treturn  x  \n\n   \n    # ﬁne ① ｗｉｄｅ ½",
    "\u0301starts with a mark",
    "🙂",
    "北",
    "the cat and the mat and the rain " * 12,
    "ends with blanks    \n  ",
]


def training_texts() -> list[str]:
    """Enough for 1,000 tokens: those texts' words between blanks of all kinds, in random order."""
    rng = random.Random(0)
    words = " ".join(TEXTS).split() + [
        "".join(rng.choices("aeinorst北京🙂\u0301", k=rng.randint(2, 6))) for _ in range(500)
    ]
    blanks = [" ", " ", " ", "  ", "\n", "\n   ", "\r\n\t", " \n"]
    return ["".join(rng.choice(words) + rng.choice(blanks) for _ in range(20)) for _ in range(600)]


TRAINING_TEXTS = training_texts()


def wrapped(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, **special)


def byte_level(vocab_size: int, trim_offsets: bool, use_regex: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXTS, trainer)
    return wrapped(tokenizer)


def metaspace(as_normalizer: bool) -> PreTrainedTokenizerFast:
    """Llama's kind: blanks are ▁, one is put before the text, unknown characters fall back to their bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if as_normalizer:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = [END, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, limit_alphabet=20, show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXTS, trainer)
    return wrapped(tokenizer, unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = [END, "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXTS, trainer)
    return wrapped(tokenizer, unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """Has no token for blanks, and drops accents."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=[END, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXTS, trainer)
    return wrapped(tokenizer, unk_token="<unk>")


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": lambda: byte_level(257, trim_offsets=False),
    "bytes-trimmed": lambda: byte_level(257, trim_offsets=True),
    "400": lambda: byte_level(400, trim_offsets=False),
    "400-trimmed": lambda: byte_level(400, trim_offsets=True),
    "1000": lambda: byte_level(1000, trim_offsets=False),
    "1000-trimmed-across-words": lambda: byte_level(1000, trim_offsets=True, use_regex=False),
    "metaspace": lambda: metaspace(as_normalizer=False),
    "metaspace-normalizer": lambda: metaspace(as_normalizer=True),
    "unigram": unigram,
    "word-piece": word_piece,
}
WITHOUT_LOSS = [name for name in MAKERS if name not in ("unigram", "word-piece")]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    made = {name: make() for name, make in MAKERS.items()}
    assert [len(made[name]) for name in ("bytes", "400", "1000")] == [257, 400, 1000]
    return made


def corpus(
    tokenizer: PreTrainedTokenizerFast, block_size: int, texts: list[str] = TEXTS
) -> tuple[Dataset, DocumentTokens]:
    """The texts, packed plainly."""
    encoded = [[*ids, tokenizer.eos_token_id] for ids in encode_documents(tokenizer, texts)]
    stream = [*chain.from_iterable(encoded)]
    blocks = [stream[at : at + block_size] for at in range(0, len(stream) - block_size + 1, block_size)]
    sources = [f"text {number}" for number in range(len(texts))]
    documents = Dataset.from_dict({"text": texts, "source": sources})
    return Dataset.from_dict({"input_ids": blocks}), DocumentTokens(documents, np.array([len(ids) for ids in encoded]))


def reader(
    students: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, block_size: int, context: int | None = None
) -> OtherTokens:
    return OtherTokens(*_with_size(*corpus(students, block_size), block_size), students, teacher, context)


def _with_size(blocks: Dataset, documents: DocumentTokens, size: int) -> tuple[Dataset, int, DocumentTokens]:
    return blocks, size, documents


def read_whole(students: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> Passages:
    """All documents as one block."""
    return reader(students, teacher, sum(len(ids) + 1 for ids in encode_documents(students, TEXTS)))(0, 1)


# ---- the index alone


def plainly(student_ends: np.ndarray, teacher_ends: np.ndarray) -> list[int]:
    chosen = []
    for i, end in enumerate(student_ends):
        students = [n for n, other in enumerate(student_ends) if other == end]
        teachers = [n for n, other in enumerate(teacher_ends) if other == end]
        if teachers:
            j = students.index(i) + 1
            chosen.append(
                next(t for number, t in enumerate(teachers, 1) if number * len(students) >= j * len(teachers))
            )
        else:
            chosen.append(min(n for n, other in enumerate(teacher_ends) if other > end))
    return chosen


def random_ends(rng: np.random.Generator, length: int) -> np.ndarray:
    """Ends of a random cut of `length` characters, some of them of several tokens."""
    inner = rng.choice(np.arange(1, length), size=rng.integers(0, length), replace=False)
    ends = np.sort(np.append(inner, length))
    return np.repeat(ends, rng.choice([1, 1, 1, 2, 3, 4], size=len(ends)))


def test_the_index_is_that_of_a_plain_search() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        length = int(rng.integers(1, 40))
        student, teacher = random_ends(rng, length), random_ends(rng, length)
        found = align_tokens(student, teacher)
        assert found.tolist() == plainly(student, teacher), seed
        assert (np.diff(found) >= 0).all(), seed
        assert align_tokens(student, student).tolist() == [*range(len(student))], seed


def test_the_index_of_a_split_character() -> None:
    # One character at 3 to 4, of four tokens against two, one, three; and the other way round.
    assert align_tokens(np.array([3, 4, 4, 4, 4]), np.array([3, 4, 4])).tolist() == [0, 1, 1, 2, 2]
    assert align_tokens(np.array([4, 4, 4, 4]), np.array([4])).tolist() == [0, 0, 0, 0]
    assert align_tokens(np.array([4, 4]), np.array([1, 4, 4, 4])).tolist() == [2, 3]
    assert align_tokens(np.array([4]), np.array([4, 4, 4, 4])).tolist() == [3]


# ---- the same tokenizer


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("block_size", [2, 16])
def test_the_same_tokenizer_reads_the_blocks_as_they_are(
    name: str, block_size: int, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    tokenizer = tokenizers[name]
    other = reader(tokenizer, copy.deepcopy(tokenizer), block_size)
    blocks, documents = corpus(tokenizer, block_size)
    same = SameTokens(blocks, tokenizer, documents)
    assert len(other) == len(same) == len(blocks)
    for start in range(0, len(other), 5):
        found, expected = other(start, start + 5), same(start, start + 5)
        assert found.input_ids.dtype == expected.input_ids.dtype
        assert torch.equal(found.input_ids, expected.input_ids)
        assert found.attention_mask is None
        assert found.token_of is not None
        assert torch.equal(found.token_of.flatten(), torch.arange(found.input_ids.numel()))
        assert found.documents is not None
        assert np.array_equal(found.documents, expected.documents)
    assert other.source(3) == same.source(3) == "text 3"


@pytest.fixture
def extractor_for(random_teacher: Callable[..., PreTrainedModel]) -> Callable[..., ConceptExtractor]:
    def make(tokenizer: PreTrainedTokenizerFast) -> ConceptExtractor:
        teacher = random_teacher("gpt2", vocab_size=len(tokenizer), max_position_embeddings=512)
        width, latents = teacher.config.hidden_size, 48
        weights = {
            "W_enc": torch.randn(width, latents, dtype=torch.float64),
            "b_enc": torch.randn(latents, dtype=torch.float64),
            "W_dec": torch.randn(latents, width, dtype=torch.float64),
            "b_dec": torch.randn(width, dtype=torch.float64),
        }
        return ConceptExtractor(
            teacher, SparseAutoencoder(**weights, k=6), teacher_layer=1, labels_per_token=3, selection="attribution"
        )

    return make


def labels_of(extractor: ConceptExtractor, passages: Passages) -> torch.Tensor:
    return passages.to_students(extractor(passages.input_ids, passages.attention_mask).ids)


def test_the_same_tokenizer_gives_the_same_labels(
    tokenizers: dict[str, PreTrainedTokenizerFast], extractor_for: Callable[..., ConceptExtractor]
) -> None:
    tokenizer = tokenizers["400"]
    extractor = extractor_for(tokenizer)
    other = reader(tokenizer, tokenizer, 16)
    same = SameTokens(corpus(tokenizer, 16)[0], tokenizer)
    found = labels_of(extractor, other(0, len(other)))
    assert torch.equal(found, labels_of(extractor, same(0, len(same))))
    assert (found[:, :-1] >= 0).any(-1).all()


# ---- other tokenizers


def byte_spans(tokenizer: PreTrainedTokenizerFast, text: str) -> list[tuple[int, int]]:
    """First and last character of `text` of which each of its tokens holds a byte, by decoding token by token."""
    pieces = tokenizer.convert_ids_to_tokens(encode_documents(tokenizer, [text])[0])
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        contents = [bytes(BYTES[sign] for sign in piece) for piece in pieces]
    else:
        contents = [
            bytes([int(piece[3:5], 16)]) if piece.startswith("<0x") else piece.replace("▁", " ").encode()
            for piece in pieces
        ]
    joined = b"".join(contents)
    added = len(joined) - len(text.encode())
    assert joined == b" " * added + text.encode()
    character = [number for number, sign in enumerate(text) for _ in sign.encode()]
    ends = np.cumsum([len(content) for content in contents]) - added
    # The blank that some put before a text is of the first character.
    return [
        (character[max(end - len(content), 0)], character[max(end - 1, 0)])
        for end, content in zip(ends.tolist(), contents, strict=True)
    ]


@pytest.mark.parametrize("student", WITHOUT_LOSS)
@pytest.mark.parametrize("teacher", WITHOUT_LOSS)
def test_the_last_character_lies_in_the_teacher_token(
    student: str, teacher: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    students, teachers = tokenizers[student], tokenizers[teacher]
    passages = read_whole(students, teachers)
    assert passages.attention_mask is None
    assert passages.documents is not None
    assert passages.token_of is not None
    token_of = passages.token_of[0].tolist()
    student_at, teacher_at = 0, 0
    for number, text in enumerate(TEXTS):
        ids = [*encode_documents(teachers, [text])[0], teachers.eos_token_id]
        assert passages.input_ids[0, teacher_at : teacher_at + len(ids)].tolist() == ids
        assert (passages.documents[0, teacher_at : teacher_at + len(ids)] == number).all()
        spans = byte_spans(teachers, text)
        chosen = []
        for _, last in byte_spans(students, text):
            chosen.append(token_of[student_at] - teacher_at)
            assert 0 <= chosen[-1] < len(spans)
            assert spans[chosen[-1]][0] <= last <= spans[chosen[-1]][1], (text, last)
            student_at += 1
        assert chosen == sorted(chosen)
        assert token_of[student_at] == teacher_at + len(spans)  # end-of-text takes end-of-text
        student_at, teacher_at = student_at + 1, teacher_at + len(ids)
    assert teacher_at == passages.input_ids.numel()


@pytest.mark.parametrize("student", MAKERS)
@pytest.mark.parametrize("teacher", ["unigram", "word-piece"])
def test_a_teacher_that_changes_the_text(
    student: str, teacher: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    """Where no teacher token holds the character, as of blanks, the next one is taken, if need be end-of-text."""
    students, teachers = tokenizers[student], tokenizers[teacher]
    passages = read_whole(students, teachers)
    assert passages.token_of is not None
    token_of = passages.token_of[0].tolist()
    student_at, teacher_at = 0, 0
    for text, encoded in zip(TEXTS, encode_with_ends(students, TEXTS), strict=True):
        spans = teachers(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        starts, ends = np.array([*spans["offset_mapping"], (len(text), len(text) + 1)]).T
        for end in [*encoded.ends.tolist(), len(text) + 1]:
            chosen = token_of[student_at] - teacher_at
            holders = np.flatnonzero((starts < end) & (ends >= end))
            assert chosen in (holders if len(holders) else [np.flatnonzero(ends >= end)[0]]), (text, end)
            student_at += 1
        assert chosen == len(starts) - 1
        teacher_at += len(starts)


@pytest.mark.parametrize("student", ["bytes", "400-trimmed", "1000", "metaspace", "word-piece"])
@pytest.mark.parametrize("teacher", ["bytes", "400-trimmed", "1000", "metaspace-normalizer", "unigram"])
@pytest.mark.parametrize(("block_size", "batch"), [(2, 7), (5, 1), (16, 3), (100, 2)])
def test_passages_are_cut_from_the_whole_text(
    student: str, teacher: str, block_size: int, batch: int, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    students, teachers = tokenizers[student], tokenizers[teacher]
    whole = read_whole(students, teachers)
    assert whole.token_of is not None
    assert whole.documents is not None
    token_of = whole.token_of[0]
    other = reader(students, teachers, block_size)
    for start in range(0, len(other), batch):
        passages = other(start, start + batch)
        assert passages.token_of is not None
        assert passages.documents is not None
        lengths = []
        for row in range(len(passages.input_ids)):
            at = (start + row) * block_size
            mapped = token_of[at : at + block_size]
            begin = min(int(mapped[0]), int(token_of[at - 1]) + 1 if at else 0)
            end = int(mapped[-1]) + 1
            lengths.append(end - begin)
            assert torch.equal(passages.input_ids[row, : lengths[-1]], whole.input_ids[0, begin:end])
            assert np.array_equal(passages.documents[row, : lengths[-1]], whole.documents[0, begin:end])
            assert (passages.documents[row, lengths[-1] :] == -1).all()
            assert torch.equal(passages.token_of[row], mapped - begin + row * passages.input_ids.shape[1])
        assert passages.input_ids.shape == passages.documents.shape == (len(lengths), max(lengths))
        if len(set(lengths)) == 1:
            assert passages.attention_mask is None
        else:
            assert passages.attention_mask is not None
            assert passages.attention_mask.tolist() == [[1] * n + [0] * (max(lengths) - n) for n in lengths]


@pytest.mark.parametrize(("student", "teacher"), [("bytes", "400"), ("1000", "bytes"), ("metaspace", "400")])
def test_what_shares_the_batch_does_not_change_labels(
    student: str,
    teacher: str,
    tokenizers: dict[str, PreTrainedTokenizerFast],
    extractor_for: Callable[..., ConceptExtractor],
) -> None:
    extractor = extractor_for(tokenizers[teacher])
    other = reader(tokenizers[student], tokenizers[teacher], 24)
    together = other(0, len(other))
    assert together.attention_mask is not None
    found = labels_of(extractor, together)
    assert found.shape == (len(other), 24, 3)
    for block in range(len(other)):
        assert torch.equal(found[block], labels_of(extractor, other(block, block + 1))[0])


def test_any_order_of_reading_gives_the_same(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    other = reader(tokenizers["bytes"], tokenizers["400"], 8)
    forward = [other(block, block + 1) for block in range(len(other))]
    for block in np.random.default_rng(0).permutation(len(other)).tolist():
        found = other(block, block + 1)
        assert torch.equal(found.input_ids, forward[block].input_ids)
        assert found.token_of is not None
        assert torch.equal(found.token_of, forward[block].token_of)


def test_a_long_document_is_encoded_once(
    tokenizers: dict[str, PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["400"]
    blocks, documents = corpus(tokenizer, 8, ["one two three", "the cat and the mat " * 50, "four five"])
    other = OtherTokens(blocks, 8, documents, tokenizer, tokenizers["bytes"])
    asked: list[tuple[int, int]] = []
    texts = documents.texts
    monkeypatch.setattr(documents, "texts", lambda start, stop: asked.append((start, stop)) or texts(start, stop))
    for block in range(len(other)):
        other(block, block + 1)
    assert sorted(number for start, stop in asked for number in range(start, stop)) == [0, 1, 2]


def test_a_bos_token_before_each_passage(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    students, plain = tokenizers["400"], tokenizers["bytes"]
    teacher = copy.deepcopy(plain)
    teacher.add_special_tokens({"bos_token": "<s>"})
    template = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", teacher.bos_token_id)])
    teacher.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    found, without = (reader(students, given, 12)(1, 4) for given in (teacher, plain))
    assert found.token_of is not None
    assert without.token_of is not None
    assert found.documents is not None
    assert without.documents is not None
    assert (found.input_ids[:, 0] == teacher.bos_token_id).all()
    assert torch.equal(found.input_ids[:, 1:], without.input_ids)
    rows = torch.arange(3)[:, None]
    wider = found.token_of - rows * found.input_ids.shape[1]
    assert torch.equal(wider, without.token_of - rows * without.input_ids.shape[1] + 1)
    assert (found.documents[:, 0] == -1).all()
    assert np.array_equal(found.documents[:, 1:], without.documents)
    assert found.attention_mask is not None
    assert without.attention_mask is not None
    assert torch.equal(found.attention_mask[:, 1:], without.attention_mask)
    assert (found.attention_mask[:, 0] == 1).all()


def test_ends_include_trimmed_blanks_and_leave_the_tokenizer_as_it_is() -> None:
    trimmed, whole = (byte_level(1000, trim_offsets=trim, use_regex=False) for trim in (True, False))
    before = tokenizer_fingerprint(trimmed)
    found, expected = encode_with_ends(trimmed, TEXTS), encode_with_ends(whole, TEXTS)
    assert tokenizer_fingerprint(trimmed) == before
    assert [one.ids.tolist() for one in found] == encode_documents(trimmed, TEXTS)
    assert [one.ends.tolist() for one in found] == [one.ends.tolist() for one in expected]
    assert found[TEXTS.index(" ")].ends.tolist() == [1]
    assert found[TEXTS.index("")].ends.tolist() == []


def test_a_token_of_no_character_ends_with_the_first_and_ends_never_decrease() -> None:
    class Stub:
        """Offsets as some tokenizers may give them: an empty span for the blank before a text, letters reordered."""

        backend_tokenizer = Tokenizer(models.BPE())

        def __call__(self, texts: list[str], **settings: object) -> dict[str, list]:
            return {"input_ids": [[5, 6, 7, 8]], "offset_mapping": [[(0, 0), (0, 3), (1, 2), (3, 4)]]}

    assert encode_with_ends(Stub(), ["text"])[0].ends.tolist() == [1, 3, 3, 4]


@pytest.mark.parametrize("context", [1, 2, 7, 16, 40])
def test_a_passage_longer_than_the_context_is_read_in_parts(
    context: int, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    """Each student token still takes the same teacher token, from a row that the teacher can read."""
    pair = tokenizers["1000"], tokenizers["bytes"]
    whole, parts = (reader(*pair, 10, context=limit)(0, 20) for limit in (None, context))
    assert whole.input_ids.shape[1] > 40
    assert parts.input_ids.shape[1] <= context
    assert len(parts.input_ids) > len(whole.input_ids)
    assert whole.attention_mask is not None
    assert whole.token_of is not None
    assert parts.token_of is not None
    mask = torch.ones_like(parts.input_ids) if parts.attention_mask is None else parts.attention_mask
    assert torch.equal(parts.input_ids[mask == 1], whole.input_ids[whole.attention_mask == 1])
    numbered = torch.arange(int(mask.sum()))  # every token that is read, in order
    places = [torch.full(m.shape, -1).masked_scatter(m == 1, numbered) for m in (whole.attention_mask, mask)]
    taken = [places[0].flatten()[whole.token_of], places[1].flatten()[parts.token_of]]
    assert torch.equal(taken[0], taken[1])
    assert (taken[0] >= 0).all()


# ---- refusals


def test_a_corpus_of_another_tokenizer_is_refused(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    blocks, documents = corpus(tokenizers["400"], 8)
    for wrong in ("bytes", "1000", "metaspace"):
        other = OtherTokens(blocks, 8, documents, tokenizers[wrong], tokenizers["400"])
        with pytest.raises(InputError, match=r"^blocks 1 to 4 of the corpus differ from their text"):
            other(1, 5)


def test_documents_of_another_corpus_are_refused(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    blocks, _ = corpus(tokenizers["400"], 8)
    _, documents = corpus(tokenizers["400"], 8, TEXTS[:3])
    with pytest.raises(InputError, match=r"its documents have only \d+ tokens: pack it again$"):
        OtherTokens(blocks, 8, documents, tokenizers["400"], tokenizers["bytes"])


@pytest.mark.parametrize("whose", ["students'", "teacher's"])
def test_a_slow_tokenizer_is_refused(whose: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    fast = tokenizers["400"]
    pair = (ByT5Tokenizer(), fast) if whose == "students'" else (fast, ByT5Tokenizer())
    blocks, documents = corpus(fast, 8)
    with pytest.raises(InputError, match=rf"^the {whose} tokenizer \(ByT5Tokenizer\) does not report") as raised:
        OtherTokens(blocks, 8, documents, *pair)
    assert "\n" not in str(raised.value)
