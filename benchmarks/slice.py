"""Run one slice of the evidence study within a time limit, and pack its results.

benchmarks/slice.sh, which starts this, says how.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from cocomix.common import environment, integrity
from cocomix.common.console import table
from cocomix.models.exporting import export_model
from cocomix.reporting.bundles import write_bundle

Content = dict[str, Any]
RECIPES = Path("recipes/slices")
WORK = Path("runs/slices")
"""Folder of all outputs; the recipes name it."""
INPUTS = Path(".inputs")
"""What a slice reads, packed for the way to the machine; in miniature, a folder in that of the outputs."""
TEXT = Path("../shared/data/corpus")
"""Default folder with the text: `train/*.jsonl.zst` and `val/*.jsonl.zst`, or jsonl."""
SHARDS = 3
COMPRESSION = 12
MAX_BYTES = 60_000_000
"""Limit on everything that travels to the machine."""
MAX_FILES, MAX_FILE_BYTES = 8, 15_000_000
"""Limits on the results."""
PACKING_SECONDS = 20
"""Part of the time limit that is kept for packing."""
STOPPING_SECONDS = 10
"""How long an interrupted training may take to end."""
EVALUATIONS = 6
"""Number of evaluations of a training whose `--max-tokens` are given."""
LEFT_AT_HOME = ("documents/train", "train-document-lengths.npy", integrity.SUMS_FILE, "sources.json")
"""Parts of a packed corpus that no training reads."""


@dataclass(frozen=True)
class Slice:
    """A slice.

    Attributes:
        corpus: recipe of its packed text.
        recipes: that run at the same time.
        evaluate: what `cocomix evaluate` measures, each with the folder of a run in `WORK`.
        models: folders of models in `WORK` whose weights are packed, in bf16.
        folders: other folders in `WORK` that are packed.
    """

    corpus: str
    recipes: tuple[str, ...]
    evaluate: tuple[tuple[str, str], ...] = ()
    models: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()


STUDENT = "h1/students/add"
SLICES = {
    "s1": Slice("corpus-4096", ("s1", "s1-untrained")),
    "g1": Slice("corpus-8192", ("g1",), models=("g1/teacher",), folders=("g1/sae",)),
    "b1": Slice("corpus-8192", ("b1", "b1-untrained")),
    "h1": Slice("corpus-8192", ("h1",), (("concepts", STUDENT), ("steering", STUDENT)), models=(STUDENT,)),
    **{name: Slice("corpus-8192", (name,)) for name in ("g0", "a1", "a2", "c1", "e1", "e2", "e3")},
}
GIVEN = {"teacher": "g1-teacher", "sae": "g1-sae"}
"""Folders that take the place of a recipe's teacher and SAE, by its keys, where they are packed with the inputs."""
SHARD_SIZE = "14MB"
TINY = {"concepts": ("--limit", "2"), "steering": ("--concepts", "2", "--prompts", "1", "--new-tokens", "4")}
"""Options of evaluations in miniature."""


def load(name: str, work: Path) -> Content:
    """Return the content of a recipe whose paths below `WORK` lie below `work`."""
    content: Content = yaml.safe_load((RECIPES / f"{name}.yaml").read_text().replace(f"{WORK}/", f"{work}/"))
    return content


def resized(content: Content, max_tokens: int | None, tokens_per_step: int | None) -> Content:
    """Return a recipe with other training tokens of its students.

    Those with more tokens than the recipe keep the difference, and those with fewer the share.
    """
    training = content["training"] = dict(content["training"])
    if tokens_per_step is not None:
        training |= {"tokens_per_step": tokens_per_step, "blocks_per_batch": tokens_per_step // content["block_size"]}
    if max_tokens is not None:
        before = training["max_tokens"]
        training |= {"max_tokens": max_tokens, "tokens_per_evaluation": max_tokens // EVALUATIONS}
        for own in (student.get("training", {}) for student in content["students"].values()):
            if "max_tokens" in own:
                tokens = own["max_tokens"]
                own["max_tokens"] = max_tokens * tokens // before if tokens < before else max_tokens + tokens - before
    return content


def tiny(content: Content) -> Content:
    """Return a recipe with the same stages in sizes that a CPU runs in seconds."""
    step = {"tokens_per_step": 1024, "blocks_per_batch": 1024 // content["block_size"], "precision": "fp32"}
    step["compile"] = False
    size = {"hidden_size": 16, "num_attention_heads": 2}
    sizes = [content.get("backbone"), content.get("teacher", {}).get("backbone")]
    for backbone in filter(None, [*sizes, *(each.get("backbone") for each in content["students"].values())]):
        backbone |= size
    if "replicates" in content:
        content["replicates"] = 2
    content["training"] |= {**step, "max_tokens": 10240, "tokens_per_evaluation": 5120}
    for student in content["students"].values():
        student.get("training", {}).pop("compile", None)
        if "max_tokens" in student.get("training", {}):
            student["training"]["max_tokens"] = 5120 if "branch_from" in student else 12288
    if "training" in content.get("teacher", {}):
        content["teacher"]["training"] |= {**step, "max_tokens": 4096, "tokens_per_evaluation": 4096}
    if "sae" in content:
        content["sae"] |= {"d_sae": 64, "k": 8, "training_tokens": 8192, "tokens_per_step": 512}
    return content


def with_given(content: Content, work: Path) -> Content:
    """Return a recipe with the teacher and SAE of another slice, where they were unpacked."""
    for key, name in GIVEN.items():
        if (work / name).exists() and not content.get("teacher", {}).get("untrained"):
            content[key]["source"] = str(work / name)
    return content


def written(content: Content, work: Path) -> Path:
    """Write a recipe; return its path."""
    path = work / f"{content['name']}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def pack_inputs(slice_: Slice, text: Path, given: Path | None, work: Path, inputs: Path, miniature: bool) -> None:
    """Write the packed text of a slice to `inputs`, and the teacher and SAE among the results `given`."""
    for side, folder, count in (("train", "train", SHARDS), ("validation", "val", 1)):
        target = work / "text" / side
        target.mkdir(parents=True, exist_ok=True)
        for shard in sorted((text / folder).glob("*.jsonl*"))[:count]:
            if not (target / shard.name).exists():
                (target / shard.name).symlink_to(shard.resolve())
    content = load(slice_.corpus, work)
    if miniature:
        content["corpus"] = {"source": content["corpus"]["source"], "max_documents": 40, "validation_fraction": 0.1}
        content["tokenizer"]["vocab_size"] = 512
    subprocess.run([sys.executable, "-m", "cocomix", "data", str(written(content, work))], check=True)
    for stale in (inputs, work / slice_.corpus, *(work / name for name in GIVEN.values())):
        shutil.rmtree(stale, ignore_errors=True)
    inputs.mkdir()
    for name in GIVEN.values() if given is not None else ():
        shutil.copy(given / f"{name}.tar.zst", inputs)
    packed = inputs / f"{slice_.corpus}.tar.zst"
    pack_folder(Path(content["output"]) / "corpus", f"{slice_.corpus}/corpus", packed, without=LEFT_AT_HOME)
    size = travelling(inputs)
    print(f"{packed}: {packed.stat().st_size / 1e6:.1f} MB; all that travels: {size / 1e6:.1f} MB")
    if size > MAX_BYTES:
        sys.exit(f"slice.py: more than {MAX_BYTES / 1e6:.0f} MB; reduce the text or the files of the checkout")


def travelling(inputs: Path) -> int:
    """Return the bytes of the checkout, wheels and inputs."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    paths = [Path(line) for line in listed.stdout.splitlines()] + [*Path(".whl").glob("*"), *inputs.glob("*")]
    return sum(path.stat().st_size for path in paths if path.is_file())


def pack_folder(folder: Path, name: str, target: Path, without: Sequence[str] = ()) -> None:
    """Write a folder as `name` to a compressed archive, without some of its parts."""

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if member.name.removeprefix(f"{name}/") in without else member

    content = BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.add(folder, name, filter=kept)
    codec = pa.Codec("zstd", compression_level=COMPRESSION)
    target.write_bytes(codec.compress(content.getvalue(), asbytes=True))


def unpack_inputs(inputs: Path, work: Path) -> None:
    """Unpack everything in `inputs` below `work`, unless it is there."""
    for packed in inputs.glob("*.tar.zst"):
        name = packed.name.partition(".")[0]
        if (work / name).exists():
            continue
        with (
            pa.CompressedInputStream(str(packed), "zstd") as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            archive.extractall(work / f"{name}.partial", filter="data")
        (work / f"{name}.partial" / name).rename(work / name)
        (work / f"{name}.partial").rmdir()


class Log:
    """Lines of several processes, each with the seconds since the start."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)
        self._lock = threading.Lock()
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._start

    def seconds_of(self, path: Path) -> float:
        """Return when a file was written, in seconds since the start."""
        return path.stat().st_mtime - time.time() + self.seconds()

    def write(self, line: str) -> None:
        """Write one line."""
        with self._lock:
            self._file.write(f"{self.seconds():7.1f} {line.rstrip()}\n")


def train(recipes: list[Path], jobs: int, options: list[str], log: Log, limit: float) -> bool:
    """Train all recipes at the same time, until `limit` seconds after the start; return whether all ended well."""
    processes, readers = [], []
    for recipe in recipes:
        command = [sys.executable, "-m", "cocomix", "train", str(recipe), "--jobs", str(jobs), *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="backslashreplace"
        )
        reader = threading.Thread(target=follow, args=(process, recipe.stem, log))
        reader.start()
        processes.append(process)
        readers.append(reader)
    for process in processes:
        wait(process, limit - log.seconds())
    stopped = [process for process in processes if process.poll() is None]
    for process in stopped:
        process.send_signal(signal.SIGTERM)
    for process in stopped:
        wait(process, STOPPING_SECONDS)
        process.kill()
    for reader in readers:
        reader.join(1)
    return not stopped and not any(process.returncode for process in processes)


def evaluate(slice_: Slice, work: Path, miniature: bool, log: Log, limit: float) -> None:
    """Evaluate the models of a slice, until `limit` seconds after the start."""
    for what, run in slice_.evaluate:
        if (work / run).exists() and log.seconds() < limit:
            command = [
                sys.executable,
                "-m",
                "cocomix",
                "evaluate",
                what,
                str(work / run),
                *(TINY[what] if miniature else ()),
            ]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="backslashreplace"
            )
            reader = threading.Thread(target=follow, args=(process, f"evaluate {what}", log), daemon=True)
            reader.start()
            wait(process, limit - log.seconds())
            process.kill()


def pack_weights(slice_: Slice, out: Path, work: Path) -> None:
    """Write the finished models and folders of a slice: an archive each, and large weights in separate files."""
    for folder in filter(Path.exists, (work / name for name in (*slice_.models, *slice_.folders))):
        name = "-".join(part for part in folder.relative_to(work).parts if part != "students")
        if folder.relative_to(work).as_posix() in slice_.models:
            exported = work / "exported" / name
            shutil.rmtree(exported, ignore_errors=True)
            shards = export_model(folder, exported, "bf16", SHARD_SIZE)
            if len(shards) > 1:
                for shard in shards:
                    shutil.move(shard, out / f"{name}-{shard.name}")
            folder = exported
        pack_folder(folder, name, out / f"{name}.tar.zst")


def wait(process: subprocess.Popen[str], seconds: float) -> None:
    """Wait for the end of a process, at most for some seconds."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(max(0.1, seconds))


def follow(process: subprocess.Popen[str], name: str, log: Log) -> None:
    """Write the lines of a process to the log."""
    assert process.stdout is not None
    for line in process.stdout:
        log.write(f"{name} {line}")


def pack_results(contents: list[Content], out: Path, work: Path, log: Log, record: Content) -> list[Content]:
    """Write the bundles of all finished runs, and a record; return a row for each run, in the order of their ends."""
    rows: list[Content] = []
    stages: Content = {}
    for content in contents:
        folder = Path(content["output"])
        runs = sorted(folder.glob("**/students/*/run.json"), key=lambda path: path.stat().st_mtime)
        if runs:
            bundle = out / f"{content['name']}.tgz"
            bundle.unlink(missing_ok=True)  # of an earlier run that was cut off
            write_bundle(folder, bundle)
        rows += [row(path, work) | {"ended": log.seconds_of(path)} for path in runs]
        for path in folder.glob("**/stage.json"):
            if "students" not in path.parts:
                summary = json.loads(path.read_text())["summary"]
                stages[str(path.parent.relative_to(work))] = {"ended": log.seconds_of(path), **summary}
    record = {**record, "seconds": log.seconds(), "runs": rows, "stages": stages}
    (out / "slice.json").write_text(json.dumps(record, indent=2) + "\n")
    return rows


def row(path: Path, work: Path) -> Content:
    """Return the figures of a finished run for the table."""
    run = json.loads(path.read_text())
    name = "/".join(part for part in path.parent.relative_to(work).parts if part != "students")
    return {"run": name, "tokens": run["tokens"], "loss": run["metrics"]["loss"], **run["timing"]}


def check_sizes(out: Path) -> None:
    """Exit if the results do not fit the way back."""
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    if len(sizes) > MAX_FILES or max(sizes.values()) > MAX_FILE_BYTES:
        sys.exit(f"slice.py: more than {MAX_FILES} files or {MAX_FILE_BYTES:,} bytes in one: {sizes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=SLICES, help="slice")
    parser.add_argument("--pack-inputs", action="store_true", help=f"only write what the slice reads to {INPUTS}")
    parser.add_argument("--text", type=Path, default=TEXT, help="folder with the text to pack")
    parser.add_argument("--given", type=Path, metavar="RESULTS", help="results of g1, to pack its teacher and SAE")
    parser.add_argument("--out", type=Path, help="folder for the results; by default runs/slices/NAME-results")
    parser.add_argument("--minutes", type=float, default=8.5, help="time limit, after which the rest is stopped")
    parser.add_argument("--jobs", type=int, default=8, help="number of stages at a time, of each recipe")
    parser.add_argument("--max-tokens", type=int, help="training tokens of the students")
    parser.add_argument("--tokens-per-step", type=int, help="of the students")
    parser.add_argument("--miniature", action="store_true", help="tiny models and little text: all stages on a CPU")
    parser.add_argument("--commit", default=environment.commit(), help="commit, where there is no checkout of git")
    arguments, options = parser.parse_known_args()
    out = arguments.out or WORK / f"{arguments.name}-{'miniature' if arguments.miniature else 'results'}"
    work = out.with_name(f"{out.name}-work") if arguments.miniature else WORK
    inputs = work / "inputs" if arguments.miniature else INPUTS
    slice_ = SLICES[arguments.name]
    if arguments.pack_inputs or (arguments.miniature and not inputs.exists()):
        pack_inputs(slice_, arguments.text, arguments.given, work, inputs, arguments.miniature)
    if arguments.pack_inputs:
        return
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "log.txt")
    unpack_inputs(inputs, work)
    log.write("inputs unpacked")
    contents = [resized(load(name, work), arguments.max_tokens, arguments.tokens_per_step) for name in slice_.recipes]
    if arguments.miniature:
        contents = [tiny(content) for content in contents]
    recipes = [written(content, work) for content in contents]
    limit = 60 * arguments.minutes - PACKING_SECONDS
    complete = train(recipes, arguments.jobs, options, log, limit)
    log.write("trained" if complete else "stopped, or a stage failed")
    evaluate(slice_, work, arguments.miniature, log, limit)
    pack_weights(slice_, out, work)
    command = " ".join(["benchmarks/slice.sh", *sys.argv[1:]])
    record = {"command": command, **environment.describe(), "commit": arguments.commit, "complete": complete}
    rows = pack_results(contents, out, work, log, record)
    cells = [
        [each["run"], f"{each['tokens']:,}", f"{each['loss']:.4f}", f"{each['seconds']:.0f}", f"{each['ended']:.0f}"]
        for each in rows
    ]
    print(table(["run", "tokens", "loss", "seconds", "ended after"], cells))
    print(f"{len(rows)} runs in {log.seconds():.0f} s; {'all' if complete else 'NOT all'} finished; results in {out}")
    check_sizes(out)


if __name__ == "__main__":
    main()
