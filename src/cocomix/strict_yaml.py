"""Read YAML files that people write: what is ambiguous or given twice is an error, never a guess."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from cocomix.errors import InputError

MAX_VALUES = 100_000
"""Values of a file with its aliases written out."""
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2.

    In version 1.1 `1e-3` is text, `on` is true, `010` is 8 and `1:30` is 90. Here they are 0.001 and texts.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)

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
    """The content of a YAML file.

    Raises:
        InputError: not YAML, a key that stands twice or is not text, or aliases that never end.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    return parse(text, str(path))


def parse(text: str, where: str) -> Any:
    """The content of a YAML text; `where` names it in error messages.

    Raises:
        InputError: as `load`.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MAX_VALUES:
            raise InputError(f"its aliases stand for more than {MAX_VALUES:,} values")
        return loader.construct_document(node)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise InputError(f"{where} is not valid YAML: {line}{error.problem}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # the last three: values of a wrong tag
        raise InputError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def _values(node: yaml.Node, known: dict[Hashable, int | None]) -> int:
    """Values below a node, aliases written out."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if node not in known:
        known[node] = None
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[node] = 1 + sum(_values(part, known) for part in parts)
    if (count := known[node]) is None:
        raise InputError(f"line {node.start_mark.line + 1}: what stands here contains itself")
    return count
