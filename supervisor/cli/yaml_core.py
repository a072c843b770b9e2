"""A YAML loader of the 1.2 core schema over PyYAML. Called by ``jobfile``; imported only when YAML is read."""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"


class CoreLoader(yaml.SafeLoader):
    """Safe, and without the surprises of 1.1; refuses a key that is given twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own attribute


def _mapping(loader: CoreLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        try:
            twice = key in found
        except TypeError:
            raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark) from None
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", key_node.start_mark)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


def _int(loader: CoreLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 16 if text.startswith("0x") else 8 if text.startswith("0o") else 10)


def _float(loader: CoreLoader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan"))


for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    # PyYAML looks resolvers up by a scalar's first character; "" stands for an empty scalar.
    CoreLoader.add_implicit_resolver(
        f"{_TAG}{_name}", re.compile(rf"^(?:{_pattern})$"), [c if c != "\0" else "" for c in _first]
    )
CoreLoader.add_constructor(f"{_TAG}map", _mapping)
CoreLoader.add_constructor(f"{_TAG}int", _int)
CoreLoader.add_constructor(f"{_TAG}float", _float)


def load(text: str) -> Any:
    """The one document in the text. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=CoreLoader)  # a subclass of SafeLoader: builds plain values only
