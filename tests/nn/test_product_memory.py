"""nn.MemoryAttention with product keys, and their index: equal to the exact memory of all pairs of half keys."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from anyattention import load, nn, save
from anyattention.errors import DimensionMismatchError, InvalidConfigError, InvalidInputError, UnsupportedError
from anyattention.interfaces import MemoryIndex
from anyattention.memory import ExactIndex, ProductKeys

_F64 = torch.float64


def made(num_heads: int = 2, **settings: Any) -> nn.MemoryAttention:
    settings = {"key_dim": 6, "value_dim": 5, "k": 4, "index": "product", "num_memories": 49, **settings}
    return nn.MemoryAttention(8, num_heads, trainable=True, dtype=_F64, **settings)


def whole_keys(half_keys: Tensor) -> Tensor:
    """All keys `(n * n, key_dim)` of half keys `(2, n, key_dim / 2)`, by a loop."""
    return torch.stack([torch.cat([first, second]) for first in half_keys[0] for second in half_keys[1]])


class TestModule:
    def test_is_attention_to_all_pairs_of_half_keys(self) -> None:
        module, x = made(), torch.randn(2, 3, 8, dtype=_F64, requires_grad=True)
        result = module.memory_forward(x)
        query = module.query_projection(x).unflatten(-1, (2, 6))
        total = torch.zeros(2, 3, 5, dtype=_F64)
        for head in range(2):
            scores = query[:, :, head] @ whole_keys(module.half_keys[:, head]).T / 6**0.5
            best = scores.topk(4)
            assert torch.equal(result.indices[:, :, head], best.indices)
            torch.testing.assert_close(result.weights[:, :, head], best.values.softmax(-1))
            total = total + (best.values.softmax(-1).unsqueeze(-1) * module.values[best.indices]).sum(-2)
        expected = module.output_projection(total)
        torch.testing.assert_close(result.output, expected)
        torch.testing.assert_close(module(x).output, expected)
        inputs, by = [x, *module.parameters()], torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(result.output, inputs, by), torch.autograd.grad(expected, inputs, by)
        )

    def test_weights_are_over_all_memories(self) -> None:
        module, x = made(), torch.randn(7, 8, dtype=_F64)
        _, weights = module(x, return_weights="heads")
        assert weights is not None
        assert weights.shape == (2, 7, 49)
        result = module.memory_forward(x)
        dense = torch.zeros(7, 2, 49, dtype=_F64).scatter(-1, result.indices, result.weights)
        torch.testing.assert_close(weights.to_dense(), dense.transpose(0, 1))

    @pytest.mark.parametrize("settings", [{}, {"num_heads": 1, "key_dim": 8, "project": False}])
    def test_is_saved_and_loaded(self, settings: Any, tmp_path: Path) -> None:
        module = made(**settings)
        save(module, tmp_path / "memory")
        loaded: Any = load(tmp_path / "memory")
        x = torch.randn(3, 8, dtype=_F64)
        assert torch.equal(loaded(x).output, module(x).output)
        assert loaded.config == module.config

    def test_derivatives(self) -> None:
        module = made(num_heads=1, key_dim=8, project=False, num_memories=9)
        x = torch.randn(3, 8, dtype=_F64, requires_grad=True)
        assert gradcheck(lambda x, *_: module(x).output, (x, module.half_keys, module.values))

    def test_a_sparse_gradient_trains_the_values(self) -> None:
        module, x = made(sparse_grad=True), torch.randn(3, 8, dtype=_F64)
        module(x).output.square().sum().backward()
        grad = module.values.grad
        assert grad is not None
        assert grad.is_sparse
        used = module.memory_forward(x).indices.unique()
        # Each row once, though PyTorch's accumulation forgets to say so.
        assert torch.equal(grad._indices()[0], used)
        assert module.half_keys.grad is not None
        before = module.values.detach().clone()
        torch.optim.SGD([module.values], lr=0.1).step()
        changed = (module.values != before).any(1).nonzero().flatten()
        assert torch.equal(changed, used)
        with torch.no_grad():
            assert module(x).output.isfinite().all()

    def test_dropout_is_for_training(self) -> None:
        module, x = made(dropout=0.5), torch.randn(3, 8, dtype=_F64)
        assert not torch.equal(module(x).output, module(x).output)
        module.eval()
        assert torch.equal(module(x).output, module(x).output)

    def test_what_needs_rows_is_refused(self) -> None:
        module, x = made(), torch.randn(3, 8, dtype=_F64)
        rows = torch.ones(4, 6, dtype=_F64), torch.ones(4, 5, dtype=_F64)
        with pytest.raises(UnsupportedError, match="every pair of half keys is a memory, and none can be appended"):
            module.append(*rows)
        with pytest.raises(UnsupportedError, match="every pair of half keys is a memory, and none can be deleted"):
            module.delete(torch.tensor([3]))
        with pytest.raises(UnsupportedError, match='keys: with index="product" the memories are all pairs'):
            module(x, keys=rows[0], values=rows[1])
        with pytest.raises(UnsupportedError, match='exclude: with index="product" the memories are all pairs'):
            module(x, exclude=torch.zeros(3, dtype=torch.int64))
        with pytest.raises(UnsupportedError, match="each head has keys of its own"):
            module.search(torch.ones(2, 6, dtype=_F64))

    def test_searches_and_gathers_by_its_only_head(self) -> None:
        module, queries = made(num_heads=1), torch.randn(3, 6, dtype=_F64)
        found = module.search(queries)
        scores, ids = (queries @ whole_keys(module.half_keys[:, 0]).T).topk(4)
        assert torch.equal(found.ids, ids)
        torch.testing.assert_close(found.scores, scores)
        keys, values = module.gather(ids)
        assert torch.equal(keys, whole_keys(module.half_keys[:, 0])[ids])
        assert torch.equal(values, module.values[ids])
        assert module.recall(queries) == 1.0
        assert module.num_memories == 49

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_memories": 48}, "num_memories: expected a square with index=.product., such as 1024"),
            ({"num_memories": None}, "num_memories: expected a square"),
            ({"key_dim": 5}, "key_dim: expected an even number with index=.product., got 5"),
            ({"k": 50}, "k: expected at most num_memories=49, got 50"),
            ({"measure": "cosine"}, "measure"),
            ({"ef_search": 100}, "ef_search"),
        ],
    )
    def test_bad_settings(self, settings: Any, message: str) -> None:
        with pytest.raises(InvalidConfigError, match=message):
            made(**settings)
        with pytest.raises(InvalidConfigError, match=r"trainable: expected True with index=.product."):
            nn.MemoryAttention(8, 2, index="product")


class TestIndex:
    def test_finds_what_an_exact_index_of_all_pairs_finds(self) -> None:
        half_keys, queries = torch.randn(2, 7, 3), torch.randn(11, 6)
        index, exact = ProductKeys(half_keys), ExactIndex(6)
        exact.append(whole_keys(half_keys))
        assert isinstance(index, MemoryIndex)
        assert (len(index), index.key_dim) == (49, 6)
        ours, theirs = index.search(queries, 60), exact.search(queries, 60)
        assert torch.equal(ours.ids[:, 49:], torch.full((11, 11), -1))
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-5, atol=1e-5)
        ids = torch.tensor([[0, 48], [-1, 13]])
        assert torch.equal(index.gather(ids), exact.gather(ids))

    def test_bad_input(self) -> None:
        index = ProductKeys(torch.randn(2, 7, 3))
        with pytest.raises(DimensionMismatchError, match=r"half_keys: expected \(2, n, key_dim / 2\), got \(3, 7, 3\)"):
            ProductKeys(torch.randn(3, 7, 3))
        with pytest.raises(DimensionMismatchError, match="key_dim is 6 in the index"):
            index.search(torch.randn(2, 5), 1)
        with pytest.raises(InvalidInputError, match="k: expected an int of at least 1, got 0"):
            index.search(torch.randn(2, 6), 0)
        with pytest.raises(InvalidInputError, match="ids: expected -1, or ids below 49"):
            index.gather(torch.tensor([49]))
        with pytest.raises(InvalidInputError, match=r"ids: expected a tensor of torch\.int64"):
            index.gather(torch.tensor([1.0]))
        with pytest.raises(UnsupportedError, match="none can be appended"):
            index.append(torch.ones(1, 6))
        with pytest.raises(UnsupportedError, match="none can be deleted"):
            index.delete(torch.tensor([1]))


def test_a_module_changes_its_dtype():
    memory = nn.MemoryAttention(8, 2, index="product", trainable=True, num_memories=16, k=2).to(torch.float64)
    assert memory(torch.randn(3, 8, dtype=torch.float64)).output.dtype == torch.float64
