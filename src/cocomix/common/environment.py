"""The environment of a measurement: commit, versions, hardware, date."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import torch

from cocomix.common import distributed
from cocomix.common.version import __version__

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "sae-lens", "lm_eval")
ROOT = Path(__file__).parents[3]
"""Root of the checkout, if this code runs from one."""


def commit(root: Path = ROOT) -> str | None:
    """Return the commit of this project's checkout at `root`, with `+` for uncommitted changes; None outside of one.

    An installed package often lies inside another project's repository, whose commit would be wrong here.
    """
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, env=surroundings
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "pyproject.toml", "src/cocomix/common/environment.py")
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
        if project.get("name") != "cocomix" or not root.samefile(git("rev-parse", "--show-toplevel")):
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "src/cocomix") else "")
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def hardware() -> str:
    """Describe processors and GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([f"{cores} CPU cores ({_processor()})", *gpus])


def versions() -> dict[str, str]:
    """Return the versions of Python, cocomix and the installed packages of `PACKAGES`."""
    found = {"python": platform.python_version(), "cocomix": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, object]:
    """Return the environment for a record."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "hardware": hardware(),
        "processes": distributed.world_size(),
        "versions": versions(),
    }
