"""`cocomix doctor`: what this installation has, on one screen, for a question or a bug report."""

from __future__ import annotations

import json
import re
import shutil
from importlib import metadata
from pathlib import Path

from cocomix.cli.options import Json
from cocomix.common.console import show

REQUIREMENT = re.compile(r"([\w.-]+).*;\s*extra\s*==\s*['\"]([\w-]+)['\"]")
DEVELOPMENT = {"dev", "docs"}


def doctor(as_json: Json = False) -> None:
    """Show versions, devices, extras and caches."""
    found = examine()
    show(json.dumps(found, indent=2) if as_json else "\n".join(f"{key:10} {value}" for key, value in found.items()))


def examine() -> dict[str, str]:
    """Describe the installation, one line for each part."""
    from huggingface_hub import constants

    from cocomix.common import environment

    extras = {name: missing_packages(name, metadata.requires("cocomix") or []) for name in extra_names()}
    cache = Path(constants.HF_HUB_CACHE)
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in environment.versions().items()),
        "commit": environment.commit() or "none: an installed package",
        "hardware": environment.hardware(),
        "precision": _precision(),
        "extras": "; ".join(f"{name}: {_state(missing)}" for name, missing in extras.items()),
        "hub": f"{constants.ENDPOINT}{', offline (HF_HUB_OFFLINE)' if constants.is_offline_mode() else ''}",
        "cache": f"{cache}{'' if cache.is_dir() else ' (empty)'}",
        "disk": f"{_free(Path.cwd())} free here, {_free(cache)} in the cache",
    }


def extra_names() -> list[str]:
    """Return the extras that users install."""
    names: list[str] = metadata.metadata("cocomix").get_all("Provides-Extra") or []
    return [name for name in names if name not in DEVELOPMENT]


def missing_packages(extra: str, requirements: list[str]) -> list[str]:
    """Return the packages of an extra that are not installed, from the requirements in a package's metadata."""
    found = [match for each in requirements if (match := REQUIREMENT.match(each)) and match[2] == extra]
    return [match[1] for match in found if not _is_installed(match[1])]


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _state(missing: list[str]) -> str:
    return f"no {', '.join(missing)}" if missing else "installed"


def _precision() -> str:
    """Describe what the accelerator computes in."""
    import torch

    if not torch.cuda.is_available():
        return "float32 (no CUDA device)"
    major, minor = torch.cuda.get_device_capability()
    return f"{'bfloat16' if torch.cuda.is_bf16_supported() else 'float32'}, compute capability {major}.{minor}"


def _free(path: Path) -> str:
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    return f"{shutil.disk_usage(existing).free / 1e9:,.0f} GB"
