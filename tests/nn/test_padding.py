"""Padding and packed documents: the same as each sequence, or each document, by itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from anyattention import Causal, Documents, Fixed, Graph, Strided, TopK, Window
from anyattention.errors import DimensionMismatchError, InvalidInputError, InvalidMaskError, UnsupportedError
from anyattention.nn import MultiHeadAttention

LENGTH, LENGTHS = 11, [11, 4, 0]


def build(**settings: Any) -> MultiHeadAttention:
    return MultiHeadAttention(12, 3, dropout=0.0, dtype=torch.float64, **settings)


def tokens(batch: int = 3) -> Tensor:
    return torch.randn(batch, LENGTH, 12, dtype=torch.float64)


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pattern", [None, Causal(), Window(3, 2), Strided(2, 1), TopK(2)], ids=str)
@pytest.mark.parametrize("given", [LENGTHS, tuple(LENGTHS), torch.tensor(LENGTHS), torch.tensor(LENGTHS).int()])
def test_lengths_are_those_of_each_sequence_alone(pattern: Any, given: Any) -> None:
    module, x = build(pattern=pattern, positions="learned"), tokens()
    x[1, 4:] = torch.nan  # what stands behind a sequence reaches nothing in it
    output = module(x, lengths=given, return_weights=False).output
    for place, length in enumerate(LENGTHS):
        assert_close(output[place, :length], module(x[place : place + 1, :length]).output[0])


def test_key_mask_hides_tokens_anywhere() -> None:
    module, x = build(), tokens()
    is_real = torch.rand(3, LENGTH) < 0.6
    expected = module(x, mask=is_real[:, None]).output
    assert_close(module(x, key_mask=is_real).output, expected)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_padding_joins_a_mask(rank: int) -> None:
    module, x = build(), tokens()
    mask = torch.rand(*(3, 3, LENGTH, LENGTH)[4 - rank :]) < 0.7
    is_real = torch.rand(3, LENGTH) < 0.8
    is_within = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    whole = mask[:, None] if rank == 3 else mask
    expected = module(x, mask=whole & (is_real & is_within)[:, None, None]).output
    assert_close(module(x, mask=mask, key_mask=is_real, lengths=LENGTHS).output, expected)


def test_a_mask_that_does_not_fit_is_named_beside_padding() -> None:
    for mask in (torch.tensor(True), torch.ones(5, 7) > 0, torch.ones(2, 1, 1, 1, 1) > 0):
        with pytest.raises(InvalidMaskError, match=r"^mask: expected a shape that broadcasts to"):
            build()(tokens(), mask=mask, lengths=LENGTHS)


def test_lengths_in_a_narrow_dtype() -> None:
    module, x = build(), torch.randn(1, 300, 12, dtype=torch.float64)
    expected = module(x, lengths=[200], return_weights=False).output
    lengths = torch.tensor([200], dtype=torch.uint8)
    assert_close(module(x, lengths=lengths, return_weights=False).output, expected)


def test_lengths_of_other_keys() -> None:
    module = build(kdim=5, vdim=7)
    query, key, value = tokens(), torch.randn(3, 6, 5).double(), torch.randn(3, 6, 7).double()
    output = module(query, key, value, lengths=[6, 2, 1]).output
    assert_close(output[1:2], module(query[1:2], key[1:2, :2], value[1:2, :2]).output)


@pytest.mark.parametrize("positions", ["none", "sinusoidal", "learned", "rope", "alibi"])
@pytest.mark.parametrize("pattern", [None, Causal(), Window(2, 1), Strided(2, 1) & Causal(), TopK(2)], ids=str)
def test_documents_are_each_by_itself(pattern: Any, positions: Any) -> None:
    module, x = (
        build(pattern=pattern, positions=positions, max_seq_len=8)
        if positions != "rope"
        else (MultiHeadAttention(12, 3, dropout=0.0, dtype=torch.float64, pattern=pattern, positions="rope")),
        tokens(2),
    )
    documents = [[4, 0, 7], [1, 2, 8]]
    output = module(x, documents=documents).output
    for place, own in enumerate(documents):
        begin = 0
        for length in own:
            part = x[place : place + 1, begin : begin + length]
            assert_close(output[place, begin : begin + length], module(part).output[0])
            begin += length


def test_documents_and_causal() -> None:
    module, x = build(causal=True), tokens(1)
    expected = MultiHeadAttention(12, 3, dropout=0.0, dtype=torch.float64, pattern=Documents((3, 8)) & Causal())
    expected.load_state_dict(module.state_dict())
    assert_close(module(x, documents=[(3, 8)]).output, expected(x).output)
    assert module(x, documents=[(3, 8)]).weights is None
    found = module(x, documents=[torch.tensor([3, 8])], return_weights=True)
    assert_close(found.to_dense(), expected(x, return_weights=True).to_dense())


def test_documents_of_no_sequences() -> None:
    assert build()(tokens(0), documents=[]).output.shape == (0, LENGTH, 12)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"lengths": [1, 2]}, DimensionMismatchError, r"^lengths: expected \(batch=3,\), got \(2,\)"),
        ({"lengths": [1, 2, 12]}, InvalidInputError, r"^lengths: expected numbers from 0 to key_length=11, got \[1, 2"),
        ({"lengths": [1, 2, -1]}, InvalidInputError, r"^lengths: expected numbers from 0 to key_length=11"),
        ({"lengths": torch.ones(3)}, InvalidInputError, r"^lengths: expected integers, got torch.float32"),
        ({"lengths": 3}, InvalidInputError, r"^lengths: expected a sequence of ints, got 3"),
        ({"lengths": [1.0, 2, 3]}, InvalidInputError, r"^lengths: expected a sequence of ints"),
        ({"key_mask": torch.ones(3, 11)}, InvalidMaskError, r"^key_mask: .*bool"),
        ({"key_mask": torch.ones(11) > 0}, InvalidMaskError, r"^key_mask: expected \(batch=3, key_length=11\), True"),
        ({"documents": [[11]]}, DimensionMismatchError, r"^documents: expected the lengths of the documents of"),
        ({"documents": 3}, DimensionMismatchError, r"^documents: expected the lengths of .*got int"),
        ({"documents": [[11], [10], [11]]}, DimensionMismatchError, r"^documents\[1\]: expected lengths that add"),
        ({"documents": [[11], [12, -1], [11]]}, Exception, r"lengths\[1\]: expected an int >= 0"),
        ({"documents": [[11]] * 3, "lengths": [1] * 3}, UnsupportedError, r"lengths with documents: they do not go"),
        ({"documents": [[11]] * 3, "mask": torch.ones(11) > 0}, UnsupportedError, r"mask with documents"),
    ],
    ids=lambda case: str(case)[:40] if isinstance(case, dict) else "",
)  # fmt: skip
def test_bad_padding(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build()(tokens(), **arguments)


def test_padding_over_patterns_that_it_does_not_fit() -> None:
    graph = Graph.from_adjacency(torch.ones(LENGTH, LENGTH))
    for arguments in ({"lengths": LENGTHS}, {"key_mask": torch.ones(3, LENGTH) > 0}):
        with pytest.raises(UnsupportedError, match=r"lengths and key_mask over a Graph: its mask is of edges"):
            build(pattern=graph)(tokens(), **arguments)
    with pytest.raises(UnsupportedError, match=r"documents with .*: only a pattern of distances"):
        build(pattern=Fixed(3, 1))(tokens(), documents=[[11]] * 3)
    with pytest.raises(DimensionMismatchError, match=r"at most max_seq_len=5"):
        build(positions="learned", max_seq_len=5)(tokens(), documents=[[5, 6]] * 3)
