"""Settings of attention over graphs of several types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from anyattention._checks import Relation, plain, require_relation
from anyattention.config.attention import AttentionConfig, GraphBase
from anyattention.config.graph import GraphScore
from anyattention.errors import InvalidConfigError
from anyattention.settings import Config, documented, require_count, require_defaults, require_usable

__all__ = ["HeterogeneousGraphAttentionConfig", "SoftmaxOver"]

SoftmaxOver = Literal["node", "relation"]


@documented
@dataclass(frozen=True)
class HeterogeneousGraphAttentionConfig(Config):
    """Settings of `nn.HeterogeneousGraphAttention`.

    Args: the fields.

    Raises:
        InvalidConfigError: a value is out of range, or is set and cannot be used.

    Example:
        >>> config = HeterogeneousGraphAttentionConfig(
        ...     AttentionConfig(64, 4),
        ...     in_features={"author": 7, "paper": 11},
        ...     relations=[("author", "writes", "paper")],
        ... )
        >>> config.widths["paper"], config.edge_widths
        (11, (None,))
        >>> HeterogeneousGraphAttentionConfig.from_json(config.to_json()) == config
        True
    """

    base: Annotated[
        AttentionConfig,
        "the settings of attention; those that `nn.GraphAttention` does not take must keep their defaults",
    ] = field(default_factory=AttentionConfig)
    in_features: Annotated[
        Mapping[str, int] | tuple[tuple[str, int], ...],
        "width of the features of each type of nodes, a dictionary; kept as pairs, in its order",
    ] = field(kw_only=True)
    relations: Annotated[
        tuple[Relation, ...] | Any,
        "what kinds of edges there may be: (type of sources, name, type of targets)",
    ] = field(kw_only=True)
    score: Annotated[GraphScore, '"dot" (HGT), "additive" (HAN) or "dynamic" (GATv2)'] = "dot"
    softmax_over: Annotated[
        SoftmaxOver,
        'the edges whose weights sum up to 1: those of a "node", whatever their relation, or those of a node and a '
        '"relation"; learned weights of the relations then join what these give',
    ] = "node"
    edge_dim: Annotated[
        int | Mapping[Relation, int] | tuple[int | None, ...] | None,
        "width of the edge features, of all relations or by relation; kept as one for each relation, None for those "
        "without",
    ] = None
    negative_slope: Annotated[float, 'slope of the LeakyReLU in the additive and dynamic scores; not for "dot"'] = 0.2
    concat: Annotated[bool, "output the heads side by side (width d_model) or their mean (width d_k)"] = True
    residual: Annotated[bool, "add a linear map of the target's features, one for each type, to the output"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_usable(self.base, GraphBase)
        object.__setattr__(self, "in_features", _read_widths(self.in_features))
        object.__setattr__(self, "relations", _read_relations(self.relations, self.widths))
        object.__setattr__(self, "edge_dim", _read_edge_dim(self.edge_dim, self.relations))
        if self.score == "dot":
            require_defaults(self, ("negative_slope",), "the dot product has no LeakyReLU")

    @property
    def widths(self) -> dict[str, int]:
        """The width of the features of each type of nodes."""
        return dict(self.in_features)

    @property
    def edge_widths(self) -> tuple[int | None, ...]:
        """The width of the edge features of each relation; None for those without."""
        found: Any = self.edge_dim
        return (None,) * len(self.relations) if found is None else found

    def get_scale(self) -> float:
        """`base.scale`; where that is None, 1 / sqrt(d_k) for "dot" and 1 for the other scores."""
        is_default = self.base.scale is None and self.score != "dot"
        return 1.0 if is_default else self.base.get_scale()


def _read_widths(given: Any) -> tuple[tuple[str, int], ...]:
    pairs = given.items() if isinstance(given, Mapping) else given
    if not isinstance(given, Mapping | tuple | list) or not all(
        isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
    ):
        raise InvalidConfigError(
            argument="in_features", expected="a dictionary of widths by type of nodes", actual=repr(given)
        )
    widths = {node_type: plain(width) for node_type, width in pairs}
    for node_type, width in widths.items():
        require_count(f"in_features[{node_type!r}]", width)
    if not widths or len(widths) < len(given):
        raise InvalidConfigError(argument="in_features", expected="each type of nodes once", actual=repr(given))
    return tuple(widths.items())


def _read_relations(given: Any, widths: Mapping[str, int]) -> tuple[Relation, ...]:
    relations = []
    for each in given if isinstance(given, Iterable) and not isinstance(given, str) else (given,):
        relation = require_relation("relations", each, InvalidConfigError)
        for node_type in (relation[0], relation[2]):
            if node_type not in widths:
                raise InvalidConfigError(
                    argument="relations",
                    expected="types of in_features: " + ", ".join(map(repr, widths)),
                    actual=f"{node_type!r} in {relation}",
                )
        relations.append(relation)
    if not relations or len(set(relations)) < len(relations):
        raise InvalidConfigError(argument="relations", expected="each relation once", actual=repr(given))
    return tuple(relations)


def _read_edge_dim(given: Any, relations: Any) -> tuple[int | None, ...] | None:
    if given is None or isinstance(given, int):
        found = [given] * len(relations)
    elif isinstance(given, Mapping):
        unknown = [each for each in given if each not in relations]
        if unknown:
            raise InvalidConfigError(
                argument="edge_dim", expected="relations among " + ", ".join(map(str, relations)), actual=unknown[0]
            )
        found: list[Any] = [given.get(relation) for relation in relations]
    elif isinstance(given, tuple | list) and len(given) == len(relations):
        found = list(given)
    else:
        raise InvalidConfigError(
            argument="edge_dim", expected="an int, a dictionary of ints by relation, or None", actual=repr(given)
        )
    found = [plain(width) for width in found]
    for relation, width in zip(relations, found, strict=True):
        if width is not None:
            require_count(f"edge_dim[{relation}]", width)
    return None if all(width is None for width in found) else tuple(found)
