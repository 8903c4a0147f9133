"""Graphs of PyTorch Geometric, `Data` and `HeteroData`, to and from safetensors files; nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from anyattention._checks import Relation, require_relation
from anyattention.errors import InvalidInputError
from anyattention.files import most_memory, require_file, write_atomically
from anyattention.training.reading import HOMOGENEOUS_RELATION, HOMOGENEOUS_TYPE
from anyattention.training.structure import STRUCTURE_WIDTH

__all__ = ["SavedGraph", "fault_of_array", "read_saved", "save_data"]

_ABOUT = "anyattention.data"
_OF_NODES = ("x", "y", "train_mask", "val_mask", "test_mask")
_OF_EDGES = ("edge_index", "edge_attr")


class SavedGraph(NamedTuple):
    """What a file has.

    Attributes:
        num_nodes: by type; a `Data` has the one type "node" and the one relation ("node", "edge", "node").
        nodes: x, y, train_mask, val_mask and test_mask of each type, those that are there.
        edges: edge_index and, where it is there, edge_attr of each relation.
        ids: of the nodes of each type that has any.
        class_names: of the class numbers, or None.
    """

    num_nodes: dict[str, int]
    nodes: dict[str, dict[str, Tensor]]
    edges: dict[Relation, dict[str, Tensor]]
    ids: dict[str, tuple[str, ...]]
    class_names: tuple[str, ...] | None


def save_data(
    data: Any,
    path: str | os.PathLike[str],
    *,
    ids: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a `Data` or `HeteroData` of PyTorch Geometric, for `anyattention train --data FILE.safetensors`.

    Written are x, y, train_mask, val_mask, test_mask, edge_index and edge_attr (of each type and relation), and the
    numbers of nodes; nothing else. A sparse x becomes dense.

    Args:
        data: with an edge_index (of each relation).
        path: of the file, which is replaced as a whole.
        ids: names of the nodes, different ones; of a HeteroData by type. They come back in predictions.
        class_names: of the class numbers from 0, different ones.

    Raises:
        InvalidInputError: another object, no edge_index, a part that is no tensor, names that are too few or not
            different, or a path that cannot be written.

    Example:
        >>> import tempfile
        >>> from types import SimpleNamespace
        >>> data = SimpleNamespace(x=torch.ones(3, 2), edge_index=torch.tensor([[0, 1], [1, 2]]), num_nodes=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_data(data, Path(folder, "small.safetensors"), ids=["a", "b", "c"])
        ...     read_saved(Path(folder, "small.safetensors")).ids
        {'node': ('a', 'b', 'c')}
    """
    nodes, edges = _stores(data)
    names = {HOMOGENEOUS_TYPE: ids} if ids is not None and not isinstance(ids, Mapping) else dict(ids or {})
    if not set(names) <= set(nodes):
        raise InvalidInputError(argument="ids", expected=f"types among {sorted(nodes)}", actual=sorted(names))
    tensors: dict[str, Tensor] = {}
    told: dict[str, Any] = {"nodes": [], "edges": []}
    for place, (name, store) in enumerate(nodes.items()):
        count = _count(name, store)
        own = _names_given(f"ids of {name!r}", names.get(name), count)
        told["nodes"].append({"type": name, "num_nodes": count, "ids": own})
        _add(tensors, f"nodes.{place}.", name, store, _OF_NODES)
    for place, (relation, store) in enumerate(edges.items()):
        if getattr(store, "edge_index", None) is None:
            raise InvalidInputError(argument="data", expected=f"an edge_index of {relation}", actual="none")
        told["edges"].append(list(relation))
        _add(tensors, f"edges.{place}.", relation, store, _OF_EDGES)
    told["classes"] = _names_given("class_names", class_names, None)
    write_atomically(Path(path), safetensors.torch.save(tensors, {_ABOUT: json.dumps(told, ensure_ascii=False)}))


def _stores(data: Any) -> tuple[dict[str, Any], dict[Relation, Any]]:
    """What data have for each type of nodes and each relation."""
    if hasattr(data, "node_types") and hasattr(data, "edge_types"):
        if not data.edge_types:
            raise InvalidInputError(argument="data", expected="at least one relation", actual="none")
        return {name: data[name] for name in data.node_types}, {each: data[each] for each in data.edge_types}
    if getattr(data, "edge_index", None) is None or getattr(data, "num_nodes", None) is None:
        raise InvalidInputError(
            argument="data", expected="a Data or HeteroData with an edge_index", actual=type(data).__name__
        )
    return {HOMOGENEOUS_TYPE: data}, {HOMOGENEOUS_RELATION: data}


def _count(name: str, store: Any) -> int:
    count = store.num_nodes
    if count is None:
        raise InvalidInputError(
            argument=f"data[{name!r}].num_nodes", expected="a number, where there is no x", actual="none"
        )
    return int(count)


def _names_given(argument: str, given: Any, count: int | None) -> list[str] | None:
    """Names as text: of strings or numbers, in a list, an array or a tensor."""
    if given is None:
        return None
    names = [str(each.item() if isinstance(each, Tensor) and each.ndim == 0 else each) for each in given]
    if count not in (None, len(names)) or len(set(names)) < len(names) or "" in names:
        expected = f"{count} different names" if count is not None else "different names"
        raise InvalidInputError(argument=argument, expected=expected, actual=f"{len(names)}, or some twice or empty")
    return names


def _add(tensors: dict[str, Tensor], prefix: str, where: object, store: Any, keys: Sequence[str]) -> None:
    for key in keys:
        value = getattr(store, key, None)
        if value is not None:
            if not isinstance(value, Tensor):
                raise InvalidInputError(
                    argument=f"data, {where!r}, {key}", expected="a torch.Tensor", actual=type(value).__name__
                )
            dense = value if value.layout == torch.strided else value.to_dense()
            # A clone, since two tensors of a file may not share memory.
            tensors[prefix + key] = dense.detach().cpu().contiguous().clone()


def read_saved(path: Path) -> SavedGraph:
    """What `save_data` wrote. Shapes and values are not checked here, but for the names.

    Raises:
        InvalidInputError: no such file, no safetensors, not of `save_data`, or nodes without features, labels and ids
            whose structure would take far more memory than the file.
    """
    try:
        size = require_file(path)
        with safetensors.safe_open(path, "pt", "cpu") as file:
            about = (file.metadata() or {}).get(_ABOUT)
            if about is None:
                raise _wrong(path, "tensors without their description")
            saved = _parsed(path, about, file)
    except (OSError, SafetensorError) as fault:
        actual = getattr(fault, "strerror", None) or str(fault)
        raise InvalidInputError(argument=str(path), expected="a readable safetensors file", actual=actual) from fault
    _require_few_bare_nodes(path, saved, size)
    return saved


def _require_few_bare_nodes(path: Path, saved: SavedGraph, size: int) -> None:
    """Raise InvalidInputError where the structure of nodes of which the file has nothing would fill the memory."""
    most, total = most_memory(size) // (4 * STRUCTURE_WIDTH), 0
    for name, count in saved.num_nodes.items():
        own = saved.nodes[name]
        if name in saved.ids or any(key in own and own[key].numel() >= count for key in ("x", "y")):
            continue
        total += count
        if total > most:
            raise InvalidInputError(
                argument=f"{path}, {name!r}, num_nodes",
                expected=f"at most {most:,} nodes without x, y and ids, for the file's size",
                actual=f"{total:,}",
            )


def _parsed(path: Path, about: str, file: Any) -> SavedGraph:
    try:
        told = json.loads(about)
    except (ValueError, RecursionError) as fault:
        raise _wrong(path, f"a description that is no JSON ({fault})") from fault
    if not isinstance(told, dict) or set(told) != {"nodes", "edges", "classes"}:
        raise _wrong(path, "another description")
    keys = set(file.keys())
    num_nodes, nodes, ids, edges = {}, {}, {}, {}
    for place, own in enumerate(_list(path, told["nodes"])):
        if not isinstance(own, dict) or set(own) != {"type", "num_nodes", "ids"}:
            raise _wrong(path, f"nodes {own!r}"[:200])
        name, count = own["type"], own["num_nodes"]
        if not isinstance(name, str) or type(count) is not int or count < 0 or name in nodes:
            raise _wrong(path, f"the type of nodes {name!r} with {count!r} nodes"[:200])
        num_nodes[name], nodes[name] = count, _tensors(file, keys, f"nodes.{place}.", _OF_NODES)
        if own["ids"] is not None:
            ids[name] = _names(path, own["ids"], count)
    for place, own in enumerate(_list(path, told["edges"])):
        relation = require_relation(f"{path}, edges", own, InvalidInputError)
        if relation in edges or not {relation[0], relation[2]} <= set(nodes):
            raise _wrong(path, f"the relation {relation}")
        edges[relation] = _tensors(file, keys, f"edges.{place}.", _OF_EDGES)
        if "edge_index" not in edges[relation]:
            raise _wrong(path, f"no edge_index of {relation}")
    if not nodes or not edges:
        raise _wrong(path, "no nodes or no edges")
    classes = None if told["classes"] is None else _names(path, told["classes"], None)
    return SavedGraph(num_nodes, nodes, edges, ids, classes)


def _tensors(file: Any, keys: set[str], prefix: str, names: Sequence[str]) -> dict[str, Tensor]:
    # Clones lie where torch allocates; what lies as the file has it may be multiplied with other rounding.
    return {name: file.get_tensor(prefix + name).clone() for name in names if prefix + name in keys}


def _list(path: Path, given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise _wrong(path, f"{given!r}"[:200])
    return given


def _names(path: Path, given: Any, count: int | None) -> tuple[str, ...]:
    names = _list(path, given)
    is_wrong = any(not isinstance(each, str) or not each for each in names)
    if is_wrong or len(set(names)) < len(names) or count not in (None, len(names)):
        raise _wrong(path, f"names {names!r}"[:200])
    return tuple(names)


def _wrong(path: Path, actual: str) -> InvalidInputError:
    return InvalidInputError(
        argument=str(path), expected="a file that anyattention.training.save_data wrote", actual=actual
    )


def fault_of_array(path: Path, where: object, key: str, expected: str, actual: Any) -> InvalidInputError:
    """The error that names an array of a file: the type or relation that it is of, and its key."""
    return InvalidInputError(argument=f"{path}, {where!r}, {key}", expected=expected, actual=actual)
