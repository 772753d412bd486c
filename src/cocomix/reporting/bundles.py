"""Bundles: the results of runs without their weights, in one file that travels between machines.

A bundle is a gzipped tar archive with the layout of an output folder: `students/NAME/` with the record of each run,
its measurements and its losses per validation document, and `report/results.json`.
"""

from __future__ import annotations

import gzip
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath

from cocomix.common import files
from cocomix.common.errors import InputError, error_message
from cocomix.evaluation.record import EVALUATION_FILE
from cocomix.reporting.report_folder import RESULTS, load_results
from cocomix.training.documents import LOSSES_FILE
from cocomix.training.run import RUN_FILE, load_run, run_folders

OF_A_RUN = (RUN_FILE, EVALUATION_FILE, LOSSES_FILE)
MAX_FILES = 10_000
MAX_BYTES = 2**27
"""Limits on the contents of a bundle, which may come from anywhere."""


def write_bundle(source: Path, target: Path) -> int:
    """Write the results of a run, or of all finished runs of an output folder, to the file `target`.

    Returns:
        Number of runs.

    Raises:
        InputError: there is no finished run in `source`, or `target` exists.
    """
    if target.exists():
        raise InputError(f"{target} exists; choose another file for the bundle")
    runs = run_folders(source)
    contents: dict[str, bytes] = {}
    for run in runs:
        load_run(run)
        for name in OF_A_RUN:
            if (run / name).is_file():
                contents[f"students/{_name(run, source)}/{name}"] = (run / name).read_bytes()
    if runs != [source] and load_results(source / "report") is not None:
        contents[f"report/{RESULTS}"] = (source / "report" / RESULTS).read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(target, files.partial(target)), tarfile.open(files.partial(target), "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return len(runs)


def _name(run: Path, source: Path) -> str:
    """Return the name of a run's folder in a bundle of `source`."""
    parts = run.relative_to(source).parts if run != source else run.resolve().parts[-1:]
    return "-".join(part for part in parts if part != "students")


@contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield the folders that are given, with each bundle replaced by a temporary folder of its contents.

    Raises:
        InputError: a file is not a bundle, or holds anything else.
    """
    with tempfile.TemporaryDirectory(prefix="cocomix-bundle-") as temporary:
        found = []
        for number, path in enumerate(paths):
            if path.is_file():
                extract(path, Path(temporary) / str(number) / path.name.partition(".")[0])
                path = Path(temporary) / str(number) / path.name.partition(".")[0]
            found.append(path)
        yield found


def extract(bundle: Path, folder: Path) -> None:
    """Write the contents of a bundle into a new folder.

    Raises:
        InputError: it is not a bundle; a member is not one of a bundle's plain files, or the contents are too large.
    """
    try:
        with gzip.open(bundle) as compressed:
            unpacked = compressed.read(MAX_BYTES + 1)
        if len(unpacked) > MAX_BYTES:
            raise InputError(f"{bundle} holds more than {MAX_BYTES:,} bytes: it is not read")
        with tarfile.open(fileobj=BytesIO(unpacked), mode="r:") as archive:
            for number, member in enumerate(archive):
                content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                if content is None or not _belongs(member.name):
                    raise InputError(f"{bundle} holds {member.name!r}, which is not part of a bundle: it is not read")
                if number >= MAX_FILES:
                    raise InputError(f"{bundle} holds more than {MAX_FILES:,} files: it is not read")
                (folder / member.name).parent.mkdir(parents=True, exist_ok=True)
                (folder / member.name).write_bytes(content.read())
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise InputError(
            f"{bundle} cannot be read as a bundle ({error_message(error)}); give a file that "
            "`cocomix export --to bundle` wrote, or the folder of a run"
        ) from None


def _belongs(name: str) -> bool:
    """Return whether a bundle may have a file of this name; none leaves the folder."""
    parts = PurePosixPath(name).parts
    if parts == ("report", RESULTS):
        return True
    return len(parts) == 3 and parts[0] == "students" and parts[1] not in ("..", "/") and parts[2] in OF_A_RUN
