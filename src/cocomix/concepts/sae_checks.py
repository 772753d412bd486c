"""Validate the files of a sparse autoencoder against their configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any, TypeVar

import torch

from cocomix.common.errors import InputError

T = TypeVar("T")
NAMES_SHOWN = 24


def require_tensors(found: Iterable[str], needed: Set[str], optional: Iterable[str], what: str, advice: str) -> None:
    """Raise `InputError` unless the tensors are exactly those of an SAE.

    Args:
        found: names of the tensors.
        needed: required names.
        optional: further names that are allowed.
        what: the SAE, for the message.
        advice: what to change, for the message.
    """
    lacking, unknown = needed - set(found), set(found) - needed - set(optional)
    if lacking or unknown:
        problems = [f"lacks {listed(sorted(lacking))}"] if lacking else []
        problems += [f"has {listed(sorted(unknown))}, which would be ignored"] if unknown else []
        raise InputError(f"{what} {' and '.join(problems)}; expected {listed(sorted(needed))}: {advice}")


def require_sizes(config: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> None:
    """Raise `InputError` if a configuration states a size that differs from that of the weights; 0 means unstated."""
    for name, size in sizes.items():
        if config.get(name) and config[name] != size:
            raise InputError(
                f"the SAE in {where} has {name} {size} by its weights and {config[name]} in its configuration: "
                "they do not belong together"
            )


def require_type(value: T, kind: type, name: str, where: str) -> T:
    """Return the value of a setting; raise `InputError` unless it has exactly this type."""
    if type(value) is not kind:
        raise InputError(
            f"the SAE in {where} has {name} {value!r:.40} in its configuration; "
            f"expected a value of type {kind.__name__}"
        )
    return value


def precision(name: object, where: str) -> torch.dtype:
    """Parse the floating-point dtype in a configuration."""
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(
            f"the SAE in {where} has the dtype {name!r} in its configuration; expected a dtype such as 'float32'"
        )
    return dtype


def listed(names: list[str]) -> str:
    """Join names by commas; after the first `NAMES_SHOWN`, state how many follow."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
