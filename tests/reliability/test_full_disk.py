"""A full disk or a limit on the size of files ends every stage in one line; the rerun equals the undisturbed run."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import forked
from cocomix.pipeline.stage import RECORD_FILE
from every_stage import result, small_recipe
from tiny_run import once, write_text

pytestmark = pytest.mark.reliability
STEPS = {
    "corpus": ["data"],
    "teacher": ["teacher"],
    "sae": ["sae"],
    "labels": ["label"],
    "catalog": ["concepts"],
    "students/kd": ["train", "--only", "kd"],
    "students/ntp": ["train", "--only", "ntp"],
    "students/cocomix": ["train", "--only", "cocomix"],
    "report": ["run"],
}
"""The command that finishes each folder."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe run without a fault, with its text."""

    def build(folder: Path) -> None:
        recipe = small_recipe(write_text(folder / "text", documents=120), folder / "out")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        for command in STEPS.values():
            assert run(folder, command, folder / "out") == 0, (folder / "log").read_text()

    return once(tmp_path_factory, "full-disk", build)


def limited(arguments: list[str], limit: int | None) -> int:
    """Run `cocomix` with a limit on the size of the files that it writes."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return forked.command(arguments)


def run(folder: Path, command: list[str], output: Path, limit: int | None = None) -> int | None:
    """Run a command on the recipe in `folder`; its messages are in the new file `log` there."""
    (folder / "log").unlink(missing_ok=True)
    arguments = [command[0], str(folder / "recipe.yaml"), *command[1:], "--output", str(output)]
    (code,) = forked.exit_codes(forked.start(limited, arguments, limit, log=folder / "log"))
    return code


def assert_ended_in_a_line(folder: Path, words: str) -> None:
    told = (folder / "log").read_text()
    lines = [line for line in told.replace("\r", "\n").splitlines() if line.startswith("cocomix: ")]
    (line,) = [line for line in lines if "%|" not in line]  # the progress of the student of that name
    assert words in line and "Traceback" not in told, told


def copied(finished: Path, folder: Path) -> Path:
    for name in ("recipe.yaml", "text"):
        copy = shutil.copytree if (finished / name).is_dir() else shutil.copyfile
        copy(finished / name, folder / name)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["corpus"]["source"] = str(finished / "text")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_a_limit_on_files_at_every_stage(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log counts too, so no limit is below its size."""
    folder, output, refused = copied(finished, tmp_path), tmp_path / "out", 0
    for name, command in STEPS.items():
        sizes = sorted({path.stat().st_size for path in (finished / "out" / name).rglob("*") if path.is_file()})
        limits = [size - 1 for size in (sizes[len(sizes) // 2], sizes[-1]) if size > 6000]
        for limit in dict.fromkeys([6000, *limits]):
            if run(folder, command, output, limit) == 0:
                break
            assert_ended_in_a_line(folder, "File too large: raise the limit")
            assert name == "report" or not (output / name).exists() or (output / name / RECORD_FILE).is_file()
            refused += 1
        assert run(folder, command, output) == 0, (folder / "log").read_text()
    assert result(output) == result(finished / "out")
    with capsys.disabled():
        print(f"\nRLIMIT_FSIZE: {refused} commands refused, the rerun equal")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, to be enlarged."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs rights that this user lacks")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(finished: Path, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The disk grows a little after each failure."""
    folder, output, refused, kib = copied(finished, tmp_path), small_disk / "out", 0, 64
    for name, command in STEPS.items():
        while (code := run(folder, command, output)) != 0:
            assert code == 2, (folder / "log").read_text()
            assert_ended_in_a_line(folder, "free some space")
            assert name == "report" or not (output / name).exists() or (output / name / RECORD_FILE).is_file()
            refused, kib = refused + 1, kib * 5 // 4
            subprocess.run(["mount", "-o", f"remount,size={kib}k", str(small_disk)], check=True)
    assert result(output) == result(finished / "out")
    with capsys.disabled():
        print(f"\ntmpfs: {refused} commands refused, the rerun equal")
