"""YAML as programs in Go read it, which is not quite as PyYAML does: ``on`` is a word, and ``1:30`` no number."""

from __future__ import annotations

import re
from typing import Any

from yaml import MappingNode, MarkedYAMLError, Node, SafeLoader, ScalarNode, YAMLError, load_all
from yaml.composer import ComposerError

from gpusvc.errors import ConfigError


def parse(text: str, source: str) -> list[object]:
    """The documents of a file, empty ones left out.

    Raises:
        ConfigError: it is no YAML; ``source`` names it.
    """
    try:
        return [document for document in load_all(text, _Loader) if document is not None]
    except YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML{_reason(error)}.") from error
    except (RecursionError, ValueError) as error:  # a number that Python does not take
        raise ConfigError(f"{source} cannot be read as YAML: {error}.") from error


def _reason(error: YAMLError) -> str:
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return f": {' '.join(str(error).split())}"
    mark = error.problem_mark
    return f" at line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"


class _Loader(SafeLoader):
    """Resolves words as YAML 1.2 does, and takes no key twice."""

    # Not those of SafeLoader itself, which others in this process may use.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def compose_mapping_node(self, anchor: dict[Any, Node]) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode):
                if key.value in seen:
                    raise ComposerError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return node


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+0123456789.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
