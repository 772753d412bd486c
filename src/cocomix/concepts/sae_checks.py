"""Check a sparse autoencoder's files against their configuration before anything is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any, TypeVar

import torch

from cocomix.errors import InputError

T = TypeVar("T")
NAMES_SHOWN = 24


def require_tensors(found: Iterable[str], needed: Set[str], optional: Iterable[str], what: str, advice: str) -> None:
    """Raise `InputError` unless what is found are the tensors of an SAE, with none too many.

    Args:
        found: names.
        needed: names, all of them.
        optional: further names that may be there.
        what: the SAE, for the message.
        advice: what to do, for the message.
    """
    lacking, unknown = needed - set(found), set(found) - needed - set(optional)
    if lacking or unknown:
        problems = [f"lacks {listed(sorted(lacking))}"] if lacking else []
        problems += [f"has {listed(sorted(unknown))}, which would be ignored"] if unknown else []
        raise InputError(f"{what} {' and '.join(problems)}; expected {listed(sorted(needed))}: {advice}")


def require_sizes(config: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> None:
    """Raise `InputError` where a configuration states a size that is not that of the weights; 0 states none."""
    for name, size in sizes.items():
        if config.get(name) and config[name] != size:
            raise InputError(
                f"the SAE in {where} has {name} {size} by its weights and {config[name]} in its configuration: "
                "they do not belong together"
            )


def require_type(value: T, kind: type, name: str, where: str) -> T:
    """The value of a setting; `InputError` unless it is exactly of that type."""
    if type(value) is not kind:
        raise InputError(
            f"the SAE in {where} has {name} {value!r:.40} in its configuration; "
            f"expected a value of type {kind.__name__}"
        )
    return value


def precision(name: object, where: str) -> torch.dtype:
    """The floating-point type that a configuration names."""
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(
            f"the SAE in {where} has the dtype {name!r} in its configuration; expected one such as 'float32'"
        )
    return dtype


def listed(names: list[str]) -> str:
    """The names, separated by commas; of many, the first ones and the number of the others."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
