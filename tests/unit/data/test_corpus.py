from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Value, load_from_disk

from cocomix.common import settings
from cocomix.common.errors import InputError
from cocomix.data.corpus import (
    PACKED_FILE,
    CorpusConfig,
    CorpusSummary,
    StreamingConfig,
    check_corpus,
    distinct_texts,
    is_token_folder,
    write_documents,
)
from cocomix.data.mixture import TextSource
from cocomix.data.sources import read_documents, source_files
from cocomix.data.summary import skipped

FORMATS = ["", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]
Write = Callable[..., str]


def read(folder: Path, side: str) -> list[str]:
    return list(load_from_disk(str(folder / side))["text"])


def assert_input_error(action: Callable[[], object], *words: str) -> None:
    """`action` must raise one line that names all of `words`."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is missing in: {message}"


def in_validation(text: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 < fraction


def test_documents_are_split_by_the_hash_of_their_text(texts: list[str], write: Write, tmp_path: Path) -> None:
    summary = write_documents(CorpusConfig(write(texts), validation_fraction=0.2), tmp_path / "out")
    train, validation = read(tmp_path / "out", "train"), read(tmp_path / "out", "validation")
    assert validation == [text for text in texts if in_validation(text, 0.2)]
    assert train == [text for text in texts if not in_validation(text, 0.2)]
    assert 30 <= len(validation) <= 90
    assert (summary.train_documents, summary.validation_documents) == (len(train), len(validation))
    assert summary.train_bytes == sum(len(text.encode()) for text in train)
    assert summary.validation_bytes == sum(len(text.encode()) for text in validation)


@pytest.mark.parametrize("ending", FORMATS[1:])
def test_every_format_gives_the_same_corpus(ending: str, texts: list[str], write: Write, tmp_path: Path) -> None:
    expected = write_documents(CorpusConfig(write(texts, ending="")), tmp_path / "folder")
    assert write_documents(CorpusConfig(write(texts, ending=ending)), tmp_path / "file") == expected
    for side in ("train", "validation"):
        assert read(tmp_path / "file", side) == read(tmp_path / "folder", side)


def test_a_hugging_face_dataset_gives_the_same_corpus_and_leaves_the_cache_alone(
    texts: list[str], write: Write, tmp_path: Path
) -> None:
    expected = write_documents(CorpusConfig(write(texts, "plain")), tmp_path / "plain")
    (tmp_path / "hub").mkdir()
    write(texts, "hub/train", ".parquet")
    write(texts[:50], "hub/test", ".parquet")
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    before = set(cache.rglob("*"))
    source = f"hf:{tmp_path / 'hub'}"
    assert write_documents(CorpusConfig(source), tmp_path / "a") == expected
    assert write_documents(CorpusConfig(source + ":train"), tmp_path / "b") == expected
    assert [document.text for document in read_documents(source + ":test", "text")] == texts[:50]
    assert set(cache.rglob("*")) == before
    assert_input_error(lambda: write_documents(CorpusConfig(source + ":dev"), tmp_path / "c"), "dev", "SPLIT")
    assert_input_error(
        lambda: write_documents(CorpusConfig(source, text_field="body"), tmp_path / "c"),
        "record 1", "'body'", "'text'",
    )  # fmt: skip


def test_a_hugging_face_source_is_not_contacted_by_the_check() -> None:
    check_corpus(CorpusConfig("hf:nobody/nothing:train"))
    assert_input_error(lambda: check_corpus(CorpusConfig("hf:")), "names no dataset", "hf:NAME")
    assert_input_error(lambda: check_corpus(CorpusConfig("hf::train")), "names no dataset")


def test_the_fingerprint_depends_on_content_and_order_only(texts: list[str], write: Write, tmp_path: Path) -> None:
    def fingerprint(name: str, texts: list[str], fraction: float = 0.1) -> str:
        config = CorpusConfig(write(texts, name), validation_fraction=fraction)
        return write_documents(config, tmp_path / (name + "-out")).fingerprint

    base = fingerprint("a", texts)
    assert fingerprint("b", texts) == base
    assert fingerprint("c", texts[::-1]) != base
    assert fingerprint("d", [*texts[:-1], texts[-1] + "."]) != base
    assert fingerprint("e", texts, fraction=0.3) != base


def test_the_side_of_a_document_does_not_depend_on_order(texts: list[str], write: Write, tmp_path: Path) -> None:
    write_documents(CorpusConfig(write(texts, "a")), tmp_path / "forward")
    write_documents(CorpusConfig(write(texts[::-1], "b")), tmp_path / "backward")
    for side in ("train", "validation"):
        assert read(tmp_path / "backward", side) == read(tmp_path / "forward", side)[::-1]


def test_duplicates_and_empty_documents_are_dropped_and_counted(texts: list[str], write: Write, tmp_path: Path) -> None:
    clean = write_documents(CorpusConfig(write(texts, "clean")), tmp_path / "clean")
    noisy = write_documents(
        CorpusConfig(write(["", *texts[:9], texts[3], " \n\t\u3000\xa0", *texts[9:], texts[3]], "noisy")),
        tmp_path / "noisy",
    )
    assert (noisy.duplicates_dropped, noisy.empty_dropped) == (2, 2)
    assert (clean.duplicates_dropped, clean.empty_dropped) == (0, 0)
    assert noisy.fingerprint == clean.fingerprint


def test_documents_in_both_sources_are_validation_only(texts: list[str], write: Write, tmp_path: Path) -> None:
    config = CorpusConfig(write(texts, "train"), validation_source=write(texts[:7] + texts[5:7], "held-out"))
    summary = write_documents(config, tmp_path / "out")
    assert read(tmp_path / "out", "validation") == texts[:7]
    assert read(tmp_path / "out", "train") == texts[7:]
    assert summary.duplicates_dropped == 2 + 7


def test_max_documents_counts_what_is_kept_of_source(texts: list[str], write: Write, tmp_path: Path) -> None:
    source = write(["", texts[0], *texts], "source")
    summary = write_documents(CorpusConfig(source, max_documents=100, validation_fraction=0.3), tmp_path / "a")
    assert summary.train_documents + summary.validation_documents == 100
    kept = read(tmp_path / "a", "train") + read(tmp_path / "a", "validation")
    assert sorted(kept) == sorted(texts[:100])
    summary = write_documents(
        CorpusConfig(source, validation_source=write(texts[:9], "held-out"), max_documents=1), tmp_path / "b"
    )
    assert (summary.train_documents, summary.validation_documents) == (1, 9)


def test_the_source_column_is_the_records_own_or_the_file_name(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.md").write_text("# A")
    (folder / "deep" / "b.PY").write_text("b = 1")
    records = [
        {"text": "own", "source": "wiki"},
        {"text": "number", "source": 3, "x": []},
        {"text": "none", "x": 1},
    ]
    (folder / "c.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    pq.write_table(pa.table({"text": ["p", "q"], "source": ["web", None]}), folder / "d.parquet")
    documents = list(read_documents(str(folder), "text"))
    assert documents == [
        ("# A", "a.md"),
        ("own", "wiki"), ("number", "c.jsonl"), ("none", "c.jsonl"),
        ("p", "web"), ("q", "d.parquet"),
        ("b = 1", "deep/b.PY"),
    ]  # fmt: skip
    write_documents(CorpusConfig(str(folder), validation_fraction=0.5), tmp_path / "out")
    dataset = load_from_disk(str(tmp_path / "out" / "train"))
    assert dataset.features == {"text": Value("large_string"), "source": Value("string")}
    assert set(zip(dataset["text"], dataset["source"], strict=True)) < set(documents)


def test_text_arrives_unchanged(tmp_path: Path) -> None:
    text = "\ttabs \r\n trailing  \n\n\u2028 e\u0301 🙂\x0b\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # the byte-order mark is no text
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": text + "\0"}).encode() + b"\r\n")
    assert [document.text for document in read_documents(str(tmp_path), "text")] == [text, text + "\0"]


def test_another_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "jsonl", "text": 1}\n')
    pq.write_table(pa.table({"body": ["parquet"], "text": [1]}), tmp_path / "b.parquet")
    assert [document.text for document in read_documents(str(tmp_path), "body")] == ["jsonl", "parquet"]


def test_hidden_files_and_other_types_are_left_out(tmp_path: Path) -> None:
    for name in ("b.txt", ".hidden.txt", ".git/c.txt", "d.png", "sub/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [file.name for file in source_files(str(tmp_path))] == ["b.txt", "sub/a.txt"]


def test_linked_folders_are_searched_once_and_never_in_circles(tmp_path: Path) -> None:
    for name in ("text/a/one.txt", "text/b/two.txt", "elsewhere/three.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    links = {"text/0-same": "text/b", "text/b/up": "text", "text/b/top": ".", "text/more": "elsewhere",
             "elsewhere/back": "text", "here": "text"}  # fmt: skip
    for link, target in links.items():
        (tmp_path / link).symlink_to((tmp_path / target).resolve())
    names = ["a/one.txt", "b/two.txt", "more/three.txt"]
    assert [file.name for file in source_files(str(tmp_path / "text"))] == names
    assert [file.name for file in source_files(str(tmp_path / "here"))] == names


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scandir = os.scandir

    def guarded(path: str) -> Iterator[os.DirEntry[str]]:  # the tests may run as root, who may list all
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert_input_error(lambda: source_files(str(tmp_path)), "closed", "cannot be listed", "Permission denied")


def test_what_is_not_a_regular_file_is_never_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.md").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    assert list(distinct_texts(str(tmp_path), "text")) == ["a"]
    assert "Skipping gone.md" in capsys.readouterr().err
    assert_input_error(lambda: check_corpus(CorpusConfig(str(tmp_path / "pipe.txt"))), "neither a regular file nor")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    for name in ("gone.jsonl", "gone.parquet"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
        assert_input_error(lambda: check_corpus(CorpusConfig(str(tmp_path))), name, "not a regular file")
        (tmp_path / name).unlink()


def test_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "b", "source": "half \\ud800"}\n')
    write_documents(CorpusConfig(str(tmp_path), validation_fraction=0.5), tmp_path / "out")
    assert {document.source for document in read_documents(str(tmp_path), "text")} == {"caf?.txt", "half ?"}


def test_a_single_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One\n\nTwo")
    assert list(read_documents(str(tmp_path / "a.txt"), "text")) == [("One\n\nTwo", "a.txt")]


def test_the_standard_library_without_its_tests() -> None:
    names = [file.name for file in source_files("python-stdlib")]
    assert {"json/decoder.py", "os.py"} < set(names)
    assert names == sorted(names)
    excluded = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
    assert not [name for name in names if excluded & set(name.split("/")) or not name.endswith(".py")]
    check_corpus(CorpusConfig())


def test_unreadable_files_are_skipped_counted_and_named(texts: list[str], write: Write, tmp_path: Path) -> None:
    source = Path(write(texts, ending=""))
    clean = write_documents(CorpusConfig(str(source)), tmp_path / "clean")
    (source / "nul.txt").write_bytes(b"text \0 text")
    for number in range(7):
        (source / f"latin{number}.txt").write_bytes(f"caf\xe9 {number}".encode("latin-1"))
    (source / "half.jsonl").write_text('{"text": "half a pair: \\ud800"}\n')
    summary = write_documents(CorpusConfig(str(source)), tmp_path / "out")
    assert summary.unreadable_files == 9
    assert summary.unreadable_examples == ["half.jsonl", *(f"latin{number}.txt" for number in range(4))]
    assert summary.fingerprint == clean.fingerprint


def test_files_of_other_types_are_counted_and_all_that_is_left_out_is_shown(
    texts: list[str], write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(write(texts, ending=""))
    for name in ("a.rst", "b.rst", "c.html", "LICENSE", ".hidden"):
        (source / name).write_text("text")
    (source / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    summary = write_documents(CorpusConfig(str(source)), tmp_path / "out")
    assert (summary.ignored_files, summary.ignored_endings[0]) == (4, ".rst")
    told = "1 not UTF-8 text (latin1.txt), 4 files of other types (.rst, "
    assert told in capsys.readouterr().err
    assert skipped(asdict(summary)).startswith(told)
    assert skipped({"duplicates_dropped": 3, "empty_dropped": 1, "unreadable_files": 0}) == "1 empty document"


def test_several_sources_have_their_own_fields_and_weights(tmp_path: Path) -> None:
    (tmp_path / "articles.jsonl").write_text("".join(json.dumps({"body": f"a{i:09}"}) + "\n" for i in range(60)))
    pq.write_table(pa.table({"text": [f"s{i:09}" for i in range(50)]}), tmp_path / "stories.parquet")
    articles = TextSource(str(tmp_path / "articles.jsonl"), "body")
    stories = TextSource(str(tmp_path / "stories.parquet"))
    everything = CorpusConfig(sources=[articles, stories], validation_fraction=0.1)
    summary = write_documents(everything, tmp_path / "all")
    assert summary.train_documents + summary.validation_documents == 110
    weighted = [replace(articles, weight=3), replace(stories, weight=1)]
    write_documents(replace(everything, sources=weighted), tmp_path / "some")
    found = [*read(tmp_path / "some", "train"), *read(tmp_path / "some", "validation")]
    count = Counter(text[0] for text in found)  # documents of the same size
    assert count["a"] == 60 and abs(count["s"] - 20) <= 1
    (problem,) = settings.read(CorpusConfig, {"sources": [{"source": "a", "weight": 0}]})[1]
    assert problem == "sources[0].weight is 0; expected a number above 0 to 1,000,000"
    packed = tmp_path / "packed"
    (packed / "tokenizer").mkdir(parents=True)
    (packed / PACKED_FILE).write_text("{}")
    for changes, words in (
        ({"source": str(tmp_path)}, ["has no effect with corpus.sources"]),
        ({"source": str(packed)}, ["has no effect with corpus.sources"]),
        ({"streaming": StreamingConfig()}, ["cannot be streamed"]),
        ({"sources": [articles, weighted[1]]}, ["only some of corpus.sources have a weight"]),
        ({"sources": []}, ["corpus.sources is empty"]),
    ):
        assert_input_error(partial(check_corpus, replace(everything, **changes)), *words)


def test_every_file_that_lacks_the_text_field_is_found_before_the_corpus_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    pq.write_table(pa.table({"content": ["b"]}), tmp_path / "b.parquet")
    assert_input_error(lambda: check_corpus(CorpusConfig(str(tmp_path))), "b.parquet", "'content'", "text_field")
    sources = [TextSource("nowhere"), TextSource(str(tmp_path), "content")]
    with pytest.raises(InputError, match=r"(?s)'nowhere' does not exist.*\n.*a.jsonl, line 1 has no field 'content'"):
        check_corpus(CorpusConfig(sources=sources))


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\0\1\2")
    write = partial(write_documents, CorpusConfig(str(tmp_path)), tmp_path / "out")
    assert_input_error(write, "binary", "a.txt", "UTF-8")
    (tmp_path / "a.txt").write_bytes(b"")
    assert_input_error(write, str(tmp_path), "empty")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.jsonl").write_text("\n\n")
    assert_input_error(write, "empty")


def test_missing_and_unknown_sources_are_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    assert_input_error(lambda: check_corpus(CorpusConfig(missing)), missing, "does not exist", "python-stdlib", "hf:")
    (tmp_path / "a.pdf").write_text("x")
    for source in (str(tmp_path), str(tmp_path / "a.pdf")):
        check = partial(check_corpus, CorpusConfig(source))
        assert_input_error(check, source, "no file of a known type", ".txt", ".jsonl.zst", ".parquet")
    assert_input_error(lambda: check_corpus(CorpusConfig(validation_source=missing)), missing, "does not exist")


@pytest.mark.parametrize("ending", FORMATS[1:])
def test_a_missing_text_field_is_named_before_the_corpus_is_read(
    ending: str, texts: list[str], write: Write, tmp_path: Path
) -> None:
    config = CorpusConfig(write(texts, ending=ending), text_field="content")
    assert_input_error(lambda: check_corpus(config), f"corpus{ending}", "'content'", "'text'", "text_field")


def test_records_of_the_wrong_form_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    config = CorpusConfig(str(path))

    def assert_refused(second_line: bytes, *words: str) -> None:
        path.write_bytes(b'{"text": "fine"}\n' + second_line + b"\n")
        check_corpus(config)  # looks at the first line only
        assert_input_error(lambda: write_documents(config, tmp_path / "out"), "a.jsonl, line 2", *words)

    assert_refused(b'{"text": 7}', "'text'", "7", "not a string")
    assert_refused(b'{"body": "x", "id": 1}', "no field 'text'", "'body', 'id'")
    assert_refused(b"{}", "no field 'text'", "it has no field")
    assert_refused(json.dumps(dict.fromkeys(map(str, range(99)))).encode(), "'22', '23', …: set text_field")
    assert_refused(b'{"text": "cut', "not readable JSON")
    assert_refused(b'{"text": "caf\xe9"}', "not readable JSON", "utf-8")
    assert_refused(b'["text"]', "list", "expected an object")
    assert_refused(b'{"text": "a", "replies": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "recursion")
    assert_refused(b'{"text": "a", "id": ' + b"7" * 5_000 + b"}", "5000 digits")


def test_text_that_is_null_or_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "jsonl"}\n')
    columns = {
        "binary": pa.array(["naïve".encode(), b"caf\xe9", None], pa.binary()),
        "dictionary": pa.array(["one", "one", "two"]).dictionary_encode(),
        "large": pa.array(["a", None, "b"], pa.large_string()),
        "nothing": pa.nulls(1),
        "not_utf8": pa.array([b"caf\xe9", b"plain"], pa.binary()).view(pa.string()),
        "view": pa.array(["seen", None], pa.string_view()),
    }
    for name, column in columns.items():
        pq.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet")
    found = [(document.source.partition(".")[0], document.text) for document in read_documents(str(tmp_path), "text")]
    assert found == [
        ("a", ""), ("a", "jsonl"),
        ("binary", "naïve"), ("binary", None), ("binary", ""),
        ("dictionary", "one"), ("dictionary", "one"), ("dictionary", "two"),
        ("large", "a"), ("large", ""), ("large", "b"),
        ("not_utf8", None), ("not_utf8", "plain"),
        ("nothing", ""),
        ("view", "seen"), ("view", ""),
    ]  # fmt: skip


def damaged(content: bytes) -> bytes:
    """The file with its middle overwritten, its ends whole."""
    middle = len(content) // 3
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 200]) + content[middle + 200 :]


def test_parquet_of_the_wrong_form_is_refused(texts: list[str], write: Write, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"

    def assert_refused(*words: str) -> None:
        assert_input_error(lambda: write_documents(CorpusConfig(str(path)), tmp_path / "out"), "a.parquet", *words)

    pq.write_table(pa.table({"text": [["x"], ["y"]]}), path)
    assert_refused("row 1", "which is a list, not a string")
    path.write_bytes(b"not parquet at all")
    assert_refused("not a parquet file")
    pq.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), path)
    assert_refused("column 'text' more than once")
    pq.write_table(pa.table({"text": texts}), path, compression="zstd", use_dictionary=False)
    whole = path.read_bytes()
    path.write_bytes(damaged(whole))
    assert_refused("cannot be read after row 0", "damaged")
    pq.write_table(pa.table({"text": texts}), path, compression=None, use_dictionary=False, write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"Document 7.", b"Document 9."))
    assert_refused("cannot be read after row 0", "CRC")
    path.write_bytes(whole[: len(whole) // 2])
    assert_refused("not a parquet file")
    path.write_bytes(damaged(whole))
    assert_input_error(
        lambda: list(read_documents(f"hf:{tmp_path}", "text")), f"hf:{tmp_path} cannot be read after record 0"
    )


def test_zst_files_behind_datasets_name_the_package_that_reads_them(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(pa.compress(b'{"text": "a"}\n', codec="zstd", asbytes=True))
    monkeypatch.delitem(fsspec.compression.compr, "zstd", raising=False)  # as where zstandard is not installed
    assert_input_error(lambda: list(read_documents(f"hf:{tmp_path}", "text")), "pip install zstandard")


def test_a_dataset_folder_whose_name_selects_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "[2024] notes" / "sub"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(folder.parent)
    assert_input_error(
        lambda: list(read_documents("hf:./sub", "text")), "special characters", "[2024] notes", "without"
    )
    assert [document.text for document in read_documents("./sub", "text")] == ["a"]


@pytest.mark.parametrize(
    ("ending", "compress"), [(".gz", gzip.compress), (".zst", partial(pa.compress, codec="zstd", asbytes=True))]
)
def test_compressed_files_cut_short_are_refused(
    ending: str, compress: Callable[[bytes], bytes], texts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(compress(lines)[:-9])
    write = partial(write_documents, CorpusConfig(str(path)), tmp_path / "out")
    assert_input_error(write, path.name, "truncated")
    path.write_bytes(b"not compressed")
    assert_input_error(write, path.name, "damaged")
    # Two compressed parts one after the other are one file; the case of an ending does not matter.
    path.unlink()
    path = path.with_suffix(ending.upper())
    path.write_bytes(compress(lines[:5000]) + compress(lines[5000:]))
    assert [document.text for document in read_documents(str(path), "text")] == texts


def test_an_empty_side_says_what_to_change(texts: list[str], write: Write, tmp_path: Path) -> None:
    def error(config: CorpusConfig, *words: str) -> None:
        assert_input_error(lambda: write_documents(config, tmp_path / "out"), *words)

    source = write(texts[:3])
    error(
        CorpusConfig(source, validation_fraction=1e-9),
        "the validation split is empty",
        "has 3 documents",
        "raise validation_fraction",
    )
    error(CorpusConfig(source, validation_fraction=1 - 1e-9), "the train split is empty", "lower validation_fraction")
    error(CorpusConfig(source, validation_source=source), "also in validation_source", "no training data remains")
    error(CorpusConfig(source, validation_source=write([""], "void")), "void", "no document with text")


def test_token_folders_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"\0\0")
    assert not is_token_folder(str(tmp_path))
    (tmp_path / "val.bin").write_bytes(b"\0\0")
    assert is_token_folder(str(tmp_path))
    assert not is_token_folder("python-stdlib")
    check_corpus(CorpusConfig(str(tmp_path)))
    config = CorpusConfig(str(tmp_path), validation_source="python-stdlib")
    assert_input_error(lambda: check_corpus(config), "val.bin", "leave validation_source out")


def test_many_batches_keep_every_document(
    texts: list[str], write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: CorpusSummary = write_documents(CorpusConfig(write(texts)), tmp_path / "one")
    monkeypatch.setattr("cocomix.data.corpus._BATCH_BYTES", 500)
    assert write_documents(CorpusConfig(write(texts)), tmp_path / "many") == expected
    assert read(tmp_path / "many", "train") == read(tmp_path / "one", "train")


def test_reading_is_lazy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\nbroken\n')
    assert next(read_documents(str(tmp_path), "text")).text == "first"
