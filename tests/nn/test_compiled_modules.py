"""The options of MultiHeadAttention under torch.compile, whole: the numbers and gradients of the plain call."""

from typing import Any

import pytest
import torch

from anyattention import Window
from anyattention.errors import InvalidInputError
from anyattention.nn import KeyValueCache, MultiHeadAttention

CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rope": ({"positions": "rope", "num_kv_heads": 1}, {"position_offset": 3}),
    "alibi": ({"positions": "alibi", "causal": True, "softcap": 3.0}, {}),
    "window": ({"positions": "rope", "pattern": Window(1, 1)}, {}),
    "lengths": ({}, {"lengths": [6, 2]}),
    "lengths in a tensor": ({}, {"lengths": torch.tensor([6, 2])}),
    "key mask": ({}, {"key_mask": torch.arange(6) < torch.tensor([[3], [6]])}),
    "documents": ({"positions": "learned", "causal": True}, {"documents": [[2, 4], [6]]}),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiled_whole(name: str) -> None:
    settings, arguments = CALLS[name]
    torch.compiler.reset()
    module, x = MultiHeadAttention(12, 3, **settings).eval(), torch.randn(2, 6, 12, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    sources = [x, *module.parameters()]
    found, expected = compiled(x, **arguments), module(x, **arguments)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(expected.output)
    gradients = [torch.autograd.grad(each.output, sources, cotangent, allow_unused=True) for each in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_documents_of_other_lengths() -> None:
    torch.compiler.reset()
    module, x = MultiHeadAttention(12, 3, causal=True, positions="learned").eval(), torch.randn(2, 6, 12)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for documents in ([[6], [2, 4]], [[6], [3, 3]], [[1, 5], [2, 2, 2]]):
        found = compiled(x, documents=documents).output
        torch.testing.assert_close(found, module(x, documents=documents).output)


def test_lengths_that_exceed_are_refused_here_too() -> None:
    torch.compiler.reset()
    compiled = torch.compile(MultiHeadAttention(12, 3), backend="eager")
    with torch.no_grad(), pytest.raises(InvalidInputError, match=r"lengths: expected numbers from 0 to key_length=6"):
        compiled(torch.randn(2, 6, 12), lengths=[80, -3])


def test_a_compiled_module_decodes() -> None:
    torch.compiler.reset()
    module, x, cache = (
        MultiHeadAttention(12, 3, causal=True, positions="rope").eval(),
        torch.randn(2, 6, 12),
        KeyValueCache(),
    )
    compiled = torch.compile(module, backend="aot_eager")
    with torch.no_grad():
        parts = [compiled(x[:, place : place + 1], past=cache, return_weights=False).output for place in range(6)]
        torch.testing.assert_close(torch.cat(parts, 1), module(x).output)
