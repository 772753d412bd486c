from __future__ import annotations

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cocomix.common.errors import InputError
from cocomix.data import long_texts
from cocomix.data import tokenizer as tokenizers
from cocomix.data.tokenizer import (
    END_OF_TEXT,
    MIN_VOCAB_SIZE,
    encode_documents,
    encode_with_ends,
    load_tokenizer,
    same_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)

SHARED = Path(__file__).parents[3].parent / "shared"

HARD_TEXTS = [
    "",
    " ",
    "\0",
    "a\r\nb\rc\n",
    "   leading,    inner   and trailing   ",
    " " * 1000 + "\t" * 7 + "\n" * 9,
    "don't you 'll 'S",
    "a . b , c ! d ? e n't",
    "🙂👩‍👩‍👧🏳️‍🌈",
    "e\u0301 \u00e9 \u1e69 s\u0323\u0307",
    "\ufeffmark",
    "\ufffd \uffff \U0010ffff",
    "".join(map(chr, range(256))),
    END_OF_TEXT,
    f"before{END_OF_TEXT}after {END_OF_TEXT} {END_OF_TEXT}{END_OF_TEXT}",
]


def random_text(rng: random.Random) -> str:
    """Up to 80 characters of all planes, half of them from the first 256."""
    length = rng.randint(1, 80)
    codes = [rng.choice([rng.randrange(256), rng.randrange(0x110000)]) for _ in range(length)]
    return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def round_trip(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[str]:
    return [tokenizer.decode(tokens) for tokens in encode_documents(tokenizer, texts)]


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's own byte-pair encoding as a tokenizer folder."""
    source = SHARED / "data" / "gpt2_bpe"
    if not source.is_dir():
        pytest.skip(f"no GPT-2 encoding at {source}")
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copy(source / "encoder.json", folder / "vocab.json")
    shutil.copy(source / "vocab.bpe", folder / "merges.txt")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return folder


def test_the_vocabulary_has_the_asked_size_all_bytes_and_end_of_text(texts: list[str]) -> None:
    tokenizer = train_tokenizer(texts, 300)
    assert len(tokenizer) == vocabulary_size(tokenizer) == 300
    assert sorted(tokenizer.get_vocab().values()) == list(range(300))
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END_OF_TEXT, 0)
    assert tokenizer.pad_token_id == 0
    smallest = train_tokenizer(texts, MIN_VOCAB_SIZE)
    assert len(smallest) == MIN_VOCAB_SIZE == 257
    assert len(encode_documents(smallest, ["é🙂"])[0]) == len("é🙂".encode())


def test_a_small_corpus_gives_a_smaller_vocabulary() -> None:
    assert len(train_tokenizer(["abcd"], 4096)) == MIN_VOCAB_SIZE
    assert len(train_tokenizer([], 4096)) == MIN_VOCAB_SIZE
    assert len(train_tokenizer(["abab"], 4096)) == MIN_VOCAB_SIZE + 1


def test_a_vocabulary_without_room_for_all_bytes_is_refused(texts: list[str]) -> None:
    with pytest.raises(InputError, match=r"vocab_size is 256; expected at least 257"):
        train_tokenizer(texts, 256)


def test_training_is_deterministic(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(iter(texts), 320)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert same_tokenizer(again, tokenizer)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


def test_any_text_survives(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(1)
    texts = HARD_TEXTS + [random_text(rng) for _ in range(500)]
    assert len({unicodedata.category(character) for text in texts for character in text}) > 20
    assert round_trip(tokenizer, texts) == texts


def test_text_never_becomes_the_special_token() -> None:
    # Even where the corpus spells it so often that merges could build it.
    tokenizer = train_tokenizer([f"word {END_OF_TEXT} word{END_OF_TEXT}"] * 50, 400)
    encoded = encode_documents(tokenizer, HARD_TEXTS)
    assert not any(tokenizer.eos_token_id in tokens for tokens in encoded)
    assert round_trip(tokenizer, HARD_TEXTS) == HARD_TEXTS


def test_documents_are_encoded_each_by_itself(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    together = encode_documents(tokenizer, texts[:20])
    assert together == [encode_documents(tokenizer, [text])[0] for text in texts[:20]]
    assert encode_documents(tokenizer, [""]) == [[]]


def test_saving_and_loading_changes_nothing(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], tmp_path: Path
) -> None:
    fingerprint = tokenizer_fingerprint(tokenizer)
    # What the last call leaves behind is not part of the tokenizer.
    tokenizer(texts[:2], padding=True, truncation=True, max_length=5)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)):
        assert same_tokenizer(loaded, tokenizer)
        assert round_trip(loaded, HARD_TEXTS) == HARD_TEXTS
        assert encode_documents(loaded, texts) == encode_documents(tokenizer, texts)
        assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (0, 0, len(tokenizer))
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer) == fingerprint


def test_different_tokenizers_are_told_apart(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    other = train_tokenizer(texts[:20], 320)
    assert other.get_vocab().keys() != tokenizer.get_vocab().keys()
    assert not same_tokenizer(other, tokenizer)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_equal_vocabularies_with_other_tokens_are_told_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    pipeline["normalizer"] = {"type": "Lowercase"}
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(pipeline))
    lowercase = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
    assert lowercase.get_vocab() == tokenizer.get_vocab()
    assert not same_tokenizer(lowercase, tokenizer)
    assert tokenizer_fingerprint(lowercase) != tokenizer_fingerprint(tokenizer)


def test_gpt2(gpt2_folder: Path, tmp_path: Path) -> None:
    gpt2 = load_tokenizer(str(gpt2_folder))
    assert vocabulary_size(gpt2) == 50257
    assert encode_documents(gpt2, ["Hello world"]) == [[15496, 995]]
    rng = random.Random(2)
    texts = HARD_TEXTS + [random_text(rng) for _ in range(100)]
    assert not any(50256 in tokens for tokens in encode_documents(gpt2, texts))
    assert round_trip(gpt2, texts) == texts
    gpt2.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == tokenizer_fingerprint(gpt2)


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "?"}}')
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    for source, expected in [
        (str(tmp_path / "empty"), "does not load"),
        (str(tmp_path / "broken"), "does not load"),
        (str(tmp_path / "missing" / "folder"), "does not load"),
        (str(file), "give its folder"),
    ]:
        with pytest.raises(InputError) as caught:
            load_tokenizer(source)
        assert source in str(caught.value)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no end-of-text token.*eos_token"):
        load_tokenizer(str(tmp_path))


def test_a_text_that_a_tokenizer_cannot_encode_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"end": 0}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end")
    with pytest.raises(InputError, match=r"cannot encode a text \(WordLevel error: Missing \[UNK\] token"):
        encode_documents(tokenizer, ["unknown"])


@pytest.mark.parametrize("kind", ["byte-level", "a space before every text"])
def test_long_texts_are_encoded_in_pieces_that_keep_their_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut only where the tokens stay the same; nowhere with a tokenizer that puts a space before every text."""
    text = " ".join([*HARD_TEXTS, Path(__file__).read_text()] * 3)
    tokenizer = train_tokenizer([text], 500)
    if kind != "byte-level":
        tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("_")
    complete = encode_documents(tokenizer, [text, "short"])
    ends = encode_with_ends(tokenizer, [text])[0].ends
    for module in (long_texts, tokenizers):
        monkeypatch.setattr(module, "PIECE", 300)
    pieces = long_texts.pieces(text, lambda piece: encode_documents(tokenizer, [piece])[0])
    assert "".join(pieces) == text
    assert len(pieces) > 20 if kind == "byte-level" else pieces == [text]
    assert encode_documents(tokenizer, [text, "short"]) == complete
    assert (encode_with_ends(tokenizer, [text])[0].ends == ends).all()
    assert train_tokenizer([text], 500).get_vocab() == tokenizer.get_vocab()
