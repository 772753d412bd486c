"""A recorded commit is this project's, or there is none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cocomix.common.environment import commit

SOURCE = Path("src/cocomix/common/environment.py")


def checkout(folder: Path, name: str = "cocomix") -> Path:
    """A repository with one commit that holds a project of that name."""
    (folder / SOURCE).parent.mkdir(parents=True)
    (folder / SOURCE).write_text("")
    (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first")
    return folder


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout


def test_the_commit_of_a_checkout_with_a_mark_for_changes(tmp_path: Path) -> None:
    ours = checkout(tmp_path / "ours")
    head = git(ours, "rev-parse", "--short=12", "HEAD").strip()
    assert commit(ours) == head
    (ours / SOURCE).write_text("changed")
    assert commit(ours) == head + "+"


def test_a_repository_around_an_installed_or_copied_package_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = checkout(tmp_path / "theirs", "their-project")
    assert commit(theirs) is None

    installed = theirs / ".venv" / "lib" / "python3.11"
    shutil.copytree(theirs / "src", installed / "src")
    assert commit(installed) is None

    vendored = checkout(tmp_path / "vendored", "their-project") / "third_party" / "cocomix"
    checkout(vendored)
    shutil.rmtree(vendored / ".git")
    git(tmp_path / "vendored", "add", ".")
    assert commit(vendored) is None

    monkeypatch.setenv("GIT_DIR", str(theirs / ".git"))  # as in a hook
    (tmp_path / "plain").mkdir()
    assert commit(tmp_path / "plain") is None
