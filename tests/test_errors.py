"""Errors: what they are, what they say and carry, and a public path to each."""

import inspect
import pickle
import sys

import pytest
import torch

from anyattention import Graph, GraphAttentionConfig, attend, errors
from anyattention.errors import AttentionError, OutOfMemoryError
from anyattention.geometry import principal_components
from anyattention.nn import MultiHeadAttention

_BUILT_INS = {
    "DimensionMismatchError": (ValueError,),
    "GraphStructureError": (ValueError,),
    "IndexRangeError": (IndexError, ValueError),
    "InvalidConfigError": (ValueError,),
    "InvalidInputError": (ValueError,),
    "InvalidMaskError": (TypeError, ValueError),
    "MatrixOperationError": (ArithmeticError,),
    "MissingExtraError": (ImportError,),
    "NumericalInstabilityError": (ArithmeticError,),
    "OutOfMemoryError": (MemoryError,),
    "SparseMatrixError": (ValueError,),
    "TrainingError": (RuntimeError,),
    "UnsupportedError": (NotImplementedError, ValueError),
}

_X = torch.ones(2, 5, 3, 7)
_LONG = torch.ones(1, 1, 1, 1).expand(1, 2**20, 1, 1)
_EDGE_INDEX = torch.tensor([[0, 9], [1, 1]])


def _attend_on_a_graph_that_was_written_to():
    graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 1]]), num_nodes=2)
    graph.keys_by_query[1] = 2
    x = torch.ones(2, 3, 7)
    return attend(x, x, x, graph, implementation="cpu")


# By error: a call, and the argument that the error names.
_PATHS = {
    "DimensionMismatchError": (lambda: attend(_X, _X[:, :, :2], _X), "key"),
    "GraphStructureError": (lambda: Graph.from_edge_index(_EDGE_INDEX, num_nodes=2), "source (key)"),
    "IndexRangeError": (_attend_on_a_graph_that_was_written_to, None),
    "InvalidConfigError": (lambda: MultiHeadAttention(8, 3), "num_heads"),
    "InvalidInputError": (lambda: attend(_X, _X.double(), _X), "key"),
    "InvalidMaskError": (lambda: attend(_X, _X, _X, mask=torch.ones(5)), "mask"),
    "MatrixOperationError": (lambda: principal_components(torch.ones(5, 3), 1), "count"),
    "NumericalInstabilityError": (
        lambda: MultiHeadAttention(8, 2, check_finite=True)(torch.full((1, 2, 8), torch.nan)),
        "MultiHeadAttention output",
    ),
    "OutOfMemoryError": (lambda: attend(_LONG, _LONG, _LONG, return_weights=True), None),
    "SparseMatrixError": (lambda: Graph.from_adjacency([[0, 1]]), "adjacency"),
    "TrainingError": (lambda: MultiHeadAttention(8, 2).update_parameters(learning_rate=0.1), "gradients"),
    "UnsupportedError": (lambda: attend(_X, _X, _X, softcap=1.0, implementation="torch"), "implementation"),
}


def _kinds():
    return [getattr(errors, name) for name in errors.__all__]


def test_list_of_errors_is_complete():
    defined = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}
    assert set(errors.__all__) == defined == {"AttentionError", *_BUILT_INS}


@pytest.mark.parametrize("name", _BUILT_INS)
def test_error_is_also_the_fitting_built_in(name):
    kind = getattr(errors, name)
    for base in (AttentionError, *_BUILT_INS[name]):
        assert issubclass(kind, base)


@pytest.mark.parametrize("kind", _kinds())
def test_message_is_written_from_the_fields(kind):
    error = kind(argument="heads", expected="a divisor of 8", actual=3)
    assert str(error) == "heads: expected a divisor of 8, got 3"
    hinted = kind(argument="heads", expected="a divisor of 8", actual=3, hint="try 4")
    assert str(hinted) == "heads: expected a divisor of 8, got 3. try 4"
    assert (hinted.argument, hinted.expected, hinted.actual, hinted.hint) == ("heads", "a divisor of 8", 3, "try 4")


@pytest.mark.parametrize("kind", _kinds())
def test_given_message_stands(kind):
    error = kind("no heads", argument="heads", hint="try 4")
    assert str(error) == "no heads. try 4"
    assert error.argument == "heads"


@pytest.mark.parametrize("kind", _kinds())
def test_pickling_keeps_text_and_fields(kind):
    error = kind(argument="heads", expected=(2, 4), actual=3, hint="try 4")
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is kind
    assert str(twin) == str(error)
    assert vars(twin) == vars(error)
    assert vars(twin)["expected"] == (2, 4)


def test_out_of_memory_keeps_its_size():
    error = pickle.loads(pickle.dumps(OutOfMemoryError("too much", size=2**40)))
    assert (error.size, str(error)) == (2**40, "too much")
    assert OutOfMemoryError("too much").size is None


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", _PATHS)
def test_each_error_is_raised_on_a_public_path(name):
    call, argument = _PATHS[name]
    with pytest.raises(AttentionError, match=r"expected|would take|gradients|cannot run|name a place") as caught:
        call()
    assert type(caught.value).__name__ == name
    assert caught.value.argument == argument


def test_missing_extra_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(errors.MissingExtraError, match=r"needs networkx and scipy: pip install 'anyattention\[viz\]'"):
        Graph.from_networkx(object())


def test_every_error_has_a_public_path():
    assert {*_PATHS, "MissingExtraError"} == set(_BUILT_INS)


def test_requested_bytes_are_those_of_the_scores():
    with pytest.raises(OutOfMemoryError, match=r"4096.00 GiB") as caught:
        attend(_LONG, _LONG, _LONG, return_weights=True)
    assert caught.value.size == 2**20 * 2**20 * 4


def test_allocator_failures_are_named():
    with pytest.raises(OutOfMemoryError, match=r"memory ran out: .*allocate") as caught:
        Graph.from_edge_index(torch.empty(2, 0, dtype=torch.int64), num_nodes=2**49)
    assert caught.value.size == 8 * (2**49 + 1)


def test_built_ins_catch_them():
    with pytest.raises(ValueError, match="edge_dim: expected a width, got None"):
        GraphAttentionConfig(use_edge_features=True)
    with pytest.raises(NotImplementedError, match="it has no softcap"):
        attend(_X, _X, _X, softcap=1.0, implementation="torch")
