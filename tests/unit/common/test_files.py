"""Files and folders are whole or absent, and nothing of the user's is replaced or deleted."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from cocomix.common import files
from cocomix.common.errors import InputError


@pytest.fixture(autouse=True)
def deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in a home folder, three levels deep: nothing else can be lost."""
    folder = tmp_path / "home" / "projects" / "here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


def thesis(folder: Path) -> Path:
    """A file of the user's in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "thesis.tex").write_text("years of work")
    return folder


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("runs/mine", "runs/mine"),
        ("new/..", "."),
        ("new/../../x", "~/projects/x"),
        ("~/runs", "~/runs"),
        ("link/runs", "~/elsewhere/runs"),
        ("link/..", "~"),
    ],
)
def test_paths_are_resolved_before_anything_exists(deep: Path, given: str, expected: str) -> None:
    home = deep.parents[1]
    (home / "elsewhere").mkdir()
    (deep / "link").symlink_to(home / "elsewhere")
    assert files.located(given) == Path(expected).expanduser()


def test_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(InputError, match="~nobody-of-that-name/x' is not a path"):
        files.located("~nobody-of-that-name/x")


@pytest.mark.parametrize("there", ["a folder", "a file", "a link"])
def test_a_finished_folder_takes_the_place_of_nothing(deep: Path, there: str) -> None:
    thesis(deep / "corpus.partial")
    if there == "a folder":
        thesis(deep / "corpus")
    elif there == "a file":
        (deep / "corpus").write_text("years of work")
    else:
        (deep / "corpus").symlink_to(thesis(deep / "other"))
    before = (deep / "corpus").lstat()
    with pytest.raises(InputError, match=r"corpus exists and was not created by cocomix .*kept in .*corpus\.partial"):
        files.finish(deep / "corpus")
    assert (deep / "corpus").lstat() == before
    assert (deep / "corpus.partial" / "thesis.tex").exists()


def test_only_a_folder_with_the_marker_is_deleted(deep: Path) -> None:
    thesis(deep / "work")
    with files.held(deep / "work") as folder, pytest.raises(InputError, match="was not created by cocomix"):
        folder.delete("begun.json")
    assert (deep / "work" / "thesis.tex").exists()


def test_a_deletion_does_not_leave_its_folder(deep: Path) -> None:
    kept, work = thesis(deep / "kept"), deep / "work"
    (work / "inside" / "deeper").mkdir(parents=True)
    (work / "begun.json").touch()
    (work / "link").symlink_to(kept)
    (work / "inside" / "link").symlink_to(kept)
    with files.held(work) as folder:
        folder.delete("begun.json")
    assert not work.exists() and (kept / "thesis.tex").exists()


def test_a_folder_swapped_between_check_and_deletion_is_kept(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = deep / "work"
    work.mkdir()
    (work / "begun.json").touch()
    names = files.Folder.names

    def swapping(folder: files.Folder) -> set[str]:
        found = names(folder)
        work.rename(deep / "moved")
        thesis(work)
        return found

    monkeypatch.setattr(files.Folder, "names", swapping)
    with files.held(work) as folder, pytest.raises(OSError):
        folder.delete("begun.json")
    assert (work / "thesis.tex").exists()


def test_an_interrupted_deletion_leaves_a_claim_to_nothing(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = thesis(deep / "work")
    files.write_json(work / "begun.json", {"settings": 1})
    monkeypatch.setattr(files.Folder, "remove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with files.held(work) as folder, pytest.raises(KeyboardInterrupt):
        folder.delete("begun.json")
    assert files.read_json(work / "begun.json") == {}


def test_a_folder_that_is_a_link_is_not_held(deep: Path) -> None:
    (deep / "link").symlink_to(thesis(deep / "work"))
    with pytest.raises(OSError), files.held(deep / "link"):
        pass


def test_a_new_folder_is_whole_or_absent(deep: Path) -> None:
    target = deep / "export"
    with pytest.raises(KeyboardInterrupt), files.new_folder(target) as unfinished:
        (unfinished / "part").write_text("half")
        raise KeyboardInterrupt
    assert not list(deep.glob("export*"))
    with files.new_folder(target) as unfinished:
        (unfinished / "part").write_text("all")
    assert (target / "part").read_text() == "all"
    with pytest.raises(InputError, match="exists; choose another name"), files.new_folder(target):
        pass


def test_an_output_file_keeps_links_and_devices(deep: Path) -> None:
    (deep / "link.html").symlink_to("page.html")
    files.write_output(deep / "link.html", "new")
    assert (deep / "link.html").is_symlink() and (deep / "page.html").read_text() == "new"
    os.mkfifo(deep / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((deep / "pipe").read_text()))
    reader.start()
    files.write_output(deep / "pipe", "through")
    reader.join()
    assert read == ["through"] and (deep / "pipe").is_fifo()
    receiving, sending = os.pipe()
    files.write_output(Path(f"/dev/fd/{sending}"), "through")
    assert os.read(receiving, 100) == b"through"
    (deep / "null").symlink_to(os.devnull)
    files.write_output(deep / "null", "nowhere")
    assert Path(os.devnull).is_char_device()
    with pytest.raises(IsADirectoryError):
        files.write_output(deep, "a folder")


def test_an_output_file_that_cannot_be_written_leaves_the_old_one(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (deep / "page.html").write_text("old")
    (deep / "page.html.partial").write_text("the user's")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        files.write_output(deep / "page.html", "new")
    assert files.is_disk_full(caught.value)
    assert {path.name: path.read_text() for path in deep.iterdir()} == {
        "page.html": "old",
        "page.html.partial": "the user's",
    }


def test_nothing_gets_its_final_name_before_it_is_on_the_disk(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    monkeypatch.setattr(os, "rename", lambda *paths: (calls.append("rename"), rename(*paths)))
    files.write_text(deep / "a", "text")
    assert calls == [str(deep / "a.partial"), "replace", str(deep)]
    calls.clear()
    (deep / "run.partial" / "inside").mkdir(parents=True)
    (deep / "run.partial" / "inside" / "weights").touch()
    files.finish(deep / "run")
    work = deep / "run.partial"
    written = (work, work / "inside", work / "SHA256SUMS", work / "inside" / "weights")
    assert calls[:-2] == [str(path) for path in written]
    assert calls[-2:] == ["rename", str(deep)]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_damaged_json_is_named(deep: Path, content: bytes) -> None:
    (deep / "stage.json").write_bytes(content)
    with pytest.raises(InputError, match=r"stage\.json is damaged: "):
        files.read_json(deep / "stage.json")


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (Exception("I/O error: File too large (os error 27)"), errno.EFBIG),
        (
            RuntimeError("[enforce fail at inline_container.cc:815] . PytorchStreamWriter failed writing file"),
            errno.ENOSPC,
        ),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 349440 vs 349328"), errno.ENOSPC),
    ],
)
def test_what_the_system_refused_is_known_by_what_each_library_raises(error: Exception, number: int) -> None:
    wrapped = ValueError("while writing")
    wrapped.__cause__ = error
    for raised in (error, wrapped):
        failure = files.system_failure(raised)
        assert failure is not None and failure.errno == number


def test_other_errors_are_no_failure_of_the_system() -> None:
    assert files.system_failure(RuntimeError("shapes (2,) and (3,) do not fit")) is None
    assert files.system_failure(OSError("gpt9 is not a model")) is None
