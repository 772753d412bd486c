"""Read hand-written YAML strictly: ambiguous values and duplicate keys are errors."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from cocomix.common.errors import InputError, error_message

MAX_VALUES = 100_000
"""Limit on the values of a file once its aliases are expanded."""
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Loader with the scalars of YAML 1.2.

    YAML 1.1 reads `1e-3` as text, `on` as true, `010` as 8 and `1:30` as 90. Here the first is 0.001, the others text.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (class attribute of PyYAML)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == _MERGE:
                continue
            if key.tag != _TEXT:
                written = key.value if isinstance(key, yaml.ScalarNode) else "of several values"
                raise InputError(f"line {line}: the key {written} is not text; put it in quotes")
            if key.value in lines:
                raise InputError(
                    f"line {line}: {key.value} is given a second time, first in line {lines[key.value]}; "
                    "delete one of them"
                )
            lines[key.value] = line
        return node


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]{0,30}|0x[0-9a-fA-F]{1,16})", "-+0123456789"),
    "float": (
        r"[-+]?(?:(?:0|[1-9][0-9_]*)?\.[0-9_]+|(?:0|[1-9][0-9_]*)\.?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def load(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        InputError: invalid YAML, a key that is duplicated or not text, or aliases that expand without end.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    return parse(text, str(path))


def parse(text: str, where: str) -> Any:
    """Read YAML text; `where` names it in error messages.

    Raises:
        InputError: as `load`.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MAX_VALUES:
            raise InputError(f"its aliases expand to more than {MAX_VALUES:,} values")
        return loader.construct_document(node)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise InputError(f"{where} is not valid YAML: {line}{error.problem}") from None
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
    ) as error:  # the last three: invalid values of a tag
        raise InputError(f"{where} is not valid YAML: {error_message(error)}") from None


def _values(node: yaml.Node, known: dict[Hashable, int | None]) -> int:
    """Count the values below a node with aliases expanded."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if node not in known:
        known[node] = None
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[node] = 1 + sum(_values(part, known) for part in parts)
    if (count := known[node]) is None:
        raise InputError(f"line {node.start_mark.line + 1}: this value contains itself")
    return count
