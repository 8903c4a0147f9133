"""How the data of a training was read: what a folder keeps of it, so that other data are read in the same way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from anyattention._checks import Relation, require_relation
from anyattention.errors import InvalidConfigError
from anyattention.training.columns import Column, columns_from_json, columns_to_json
from anyattention.training.features import FeatureKind

__all__ = ["HOMOGENEOUS_RELATION", "HOMOGENEOUS_TYPE", "READING", "NodeReading", "ReadOptions", "Reading"]

READING = "anyattention.reading"
"""The name of a reading among what `model.safetensors` keeps."""

HOMOGENEOUS_TYPE = "node"
HOMOGENEOUS_RELATION: Relation = ("node", "edge", "node")

_KEYS = {"classes", "directed", "target", "nodes", "edges"}


@dataclass(frozen=True)
class ReadOptions:
    """What a user may say of the data.

    Args:
        seed: draws the split where the data have none.
        directed: edges go from source to target only.
        categories: columns that are categories, though they have numbers.
        ignored: columns that are not used.
        target: the type of nodes whose classes are learnt, where several have labels.
    """

    seed: int = 0
    directed: bool = False
    categories: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    target: str | None = None


@dataclass(frozen=True)
class NodeReading:
    """How the features of one type of nodes were read: what they are, and the columns; arrays have none."""

    kind: FeatureKind
    columns: tuple[Column, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How data were read.

    Attributes:
        classes: their names, in the order of the class numbers.
        directed: whether edges go from source to target only.
        target: the type of the nodes that have the classes.
        nodes: by type of nodes; data of one type have "node".
        edges: the columns of features, by relation; data of one type have ("node", "edge", "node").
    """

    classes: tuple[str, ...]
    directed: bool = False
    target: str = HOMOGENEOUS_TYPE
    nodes: Mapping[str, NodeReading] = field(default_factory=dict)
    edges: Mapping[Relation, tuple[Column, ...]] = field(default_factory=dict)

    @property
    def is_homogeneous(self) -> bool:
        """Whether there is one type of nodes and one relation."""
        return tuple(self.edges) == (HOMOGENEOUS_RELATION,) and tuple(self.nodes) == (HOMOGENEOUS_TYPE,)

    def to_json(self) -> str:
        """All of it as JSON."""
        told = {
            "classes": list(self.classes),
            "directed": self.directed,
            "target": self.target,
            "nodes": [
                {"type": name, "features": own.kind, "columns": columns_to_json(own.columns)}
                for name, own in self.nodes.items()
            ],
            "edges": [
                {"relation": list(relation), "columns": columns_to_json(own)} for relation, own in self.edges.items()
            ],
        }
        return json.dumps(told, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Reading:
        """What `to_json` made.

        Raises:
            InvalidConfigError: not JSON, other names than these, or a value of another type or out of range.
        """
        try:
            told = json.loads(text)
        except (ValueError, RecursionError) as fault:
            raise InvalidConfigError(argument="reading", expected="JSON", actual=str(fault)) from fault
        if not isinstance(told, dict) or set(told) != _KEYS:
            raise InvalidConfigError(argument="reading", expected=f"the keys {sorted(_KEYS)}", actual=repr(told)[:200])
        classes = told["classes"]
        if not _are_names(classes) or not isinstance(told["directed"], bool) or not isinstance(told["target"], str):
            raise InvalidConfigError(
                argument="reading", expected="classes by name, directed and a target", actual=repr(told)[:200]
            )
        nodes = {own["type"]: _node_reading(own) for own in _records(told["nodes"], {"type", "features", "columns"})}
        edges = {}
        for own in _records(told["edges"], {"relation", "columns"}):
            relation = require_relation("edges", own["relation"], InvalidConfigError)
            edges[relation] = columns_from_json(own["columns"])
        ends = {told["target"]} | {end for source, _, target in edges for end in (source, target)}
        if not ends <= set(nodes) or len(nodes) < len(told["nodes"]) or len(edges) < len(told["edges"]):
            raise InvalidConfigError(
                argument="reading", expected="each type of nodes and each relation once", actual=repr(told)[:200]
            )
        return cls(tuple(classes), told["directed"], told["target"], nodes, edges)


def _are_names(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(each, str) for each in given) and len(set(given)) == len(given)


def _records(given: Any, keys: set[str]) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(each, dict) and set(each) == keys for each in given):
        raise InvalidConfigError(
            argument="reading", expected=f"a list with the keys {sorted(keys)}", actual=repr(given)[:200]
        )
    return given


def _node_reading(own: dict[str, Any]) -> NodeReading:
    if not isinstance(own["type"], str) or own["features"] not in get_args(FeatureKind):
        expected = "a type and features of " + ", ".join(get_args(FeatureKind))
        raise InvalidConfigError(argument="nodes", expected=expected, actual=repr(own)[:200])
    return NodeReading(own["features"], columns_from_json(own["columns"]))
