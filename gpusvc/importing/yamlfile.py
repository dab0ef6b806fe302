"""YAML as programs in Go read it. Unlike for PyYAML, ``on`` is a word, and ``1:30`` is not a number.

go-yaml descends from libyaml, and so does the parser used here: both accept tabs where PyYAML's own parser does not.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml import MappingNode, MarkedYAMLError, Node, ScalarNode, SequenceNode, YAMLError
from yaml.composer import Composer, ComposerError

from gpusvc.errors import ConfigError

# An alias counts as all nodes that it stands for: 500 bytes can mean a billion. Configurations have thousands.
_MOST_NODES = 200_000

_DEEPEST = 100


def parse(text: str, source: str) -> list[object]:
    """Return the documents of a file without empty ones.

    Raises:
        ConfigError: it is not YAML, or too large for a configuration; ``source`` names the file.
    """
    try:
        return [document for document in yaml.load_all(text, _Loader) if document is not None]
    except YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML{_reason(error)}.") from error
    except (RecursionError, ValueError) as error:  # such as a number with too many digits
        raise ConfigError(f"{source} cannot be read as YAML: {error}.") from error


def _reason(error: YAMLError) -> str:
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return f": {' '.join(str(error).split())}"
    mark = error.problem_mark
    return f" at line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"


class _Loader(Composer, yaml.CSafeLoader):
    """Resolves words as YAML 1.2 does, refuses repeated keys, and limits what aliases stand for."""

    # A table of its own: other code in this process may use SafeLoader's.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, stream: str) -> None:
        yaml.CSafeLoader.__init__(self, stream)
        Composer.__init__(self)
        self._depth = 0
        self._nodes = 0  # so far, including those that aliases stand for
        self._sizes: dict[int, int] = {}  # numbers of nodes, by the identity of the topmost

    def compose_document(self) -> Node | None:
        """Compose a document. Nodes of earlier documents are forgotten."""
        self._sizes = {}
        return super().compose_document()

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """Compose a node. Raise ComposerError if its aliases or its depth exceed the limits."""
        event = self.peek_event()
        before = self._nodes
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _too_much(event, f"it is nested more than {_DEEPEST} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _too_much(event, f"the anchor {event.anchor!r} contains itself")
            self._nodes += self._sizes[id(node)]
        else:
            self._nodes += 1
            self._sizes[id(node)] = self._nodes - before
        if self._nodes > _MOST_NODES:
            raise _too_much(event, f"it stands for more than {_MOST_NODES} values")
        return node

    def compose_mapping_node(self, anchor: dict[Any, Node]) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode):
                if key.value in seen:
                    raise ComposerError(None, None, f"the key {key.value!r} appears twice", key.start_mark)
                seen.add(key.value)
        return node

    def construct_local(self, _suffix: str, node: Node) -> object:
        """Return a value with a local tag, such as ``!secret x``, without the tag, as go-yaml does."""
        if isinstance(node, ScalarNode):
            return self.construct_scalar(node)
        if isinstance(node, SequenceNode):
            return self.construct_sequence(node, deep=True)
        assert isinstance(node, MappingNode)  # noqa: S101 - there are three kinds of nodes
        return self.construct_mapping(node, deep=True)


def _too_much(event: Any, problem: str) -> ComposerError:
    return ComposerError(None, None, problem, event.start_mark)


_Loader.add_multi_constructor("!", _Loader.construct_local)

_FLOAT = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"

for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    # A number that begins with 0 is octal, unless it has an 8 or a 9: then it is a float.
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0o?[0-7_]+|0b[01_]+|0x[0-9a-fA-F_]+)", list("-+0123456789")),
    (
        "float",
        _FLOAT,
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
