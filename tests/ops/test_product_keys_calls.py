"""Product-key memory: sparse gradients of the values, half precision, dropout, compilation, traces and transforms."""

from typing import Any

import pytest
import torch
import torch._dynamo
from product_keys import by_all_slots, leaves
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from anyattention.errors import DimensionMismatchError, InvalidInputError, UnsupportedError
from anyattention.ops.product_keys import SlotGradient, product_key_attention

_F64 = torch.float64


@pytest.fixture(params=["cpu", "reference"])
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("native")
    return request.param


def gradient_of_values(inputs: list[Tensor], by: Tensor, **settings: Any) -> Tensor:
    result = product_key_attention(inputs[0], inputs[1], inputs[2], k=4, **settings)
    return torch.autograd.grad(result.output, inputs[2], by)[0]


class TestSparseGradient:
    @pytest.mark.parametrize("dtype", [torch.float32, _F64, torch.bfloat16])
    def test_is_the_dense_one_with_each_used_slot_once(self, implementation: str, dtype: torch.dtype) -> None:
        inputs = leaves(30, 3, 2, 7, 11, dtype)
        by = torch.randn(30, 11, dtype=dtype)
        dense = gradient_of_values(inputs, by, implementation=implementation)
        sparse = gradient_of_values(inputs, by, sparse_grad=True, implementation=implementation)
        assert sparse.layout is torch.sparse_coo
        assert sparse.is_coalesced()
        used = product_key_attention(inputs[0], inputs[1], inputs[2], k=4).indices
        assert used is not None
        assert torch.equal(sparse.indices()[0], used.unique())
        assert sparse.dtype == dense.dtype == dtype
        # Summed in bfloat16 by the reference's own parts.
        tolerance = {"rtol": 0.05, "atol": 0.05} if dtype is torch.bfloat16 else {}
        torch.testing.assert_close(sparse.to_dense(), dense, **tolerance)

    def test_is_another_with_the_same_bits(self, native: Any) -> None:
        inputs = leaves(30, 3, 2, 7, 11, torch.float32)
        by = torch.randn(30, 11)
        sparse, dense = (gradient_of_values(inputs, by, sparse_grad=given) for given in (True, False))
        assert torch.equal(sparse.to_dense(), dense)

    @pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
    @pytest.mark.parametrize("optimizer", ["SGD", "SparseAdam", "Adagrad"])
    def test_trains_as_the_dense_one(self, implementation: str, optimizer: str) -> None:
        inputs, target = leaves(13, 2, 3, 5, 3), torch.randn(13, 3, dtype=_F64)
        trained = []
        for is_sparse in (True, False):
            copies = [x.detach().clone() for x in inputs]
            copies[2].requires_grad_()
            # SparseAdam takes sparse gradients alone: given every slot's row, it is Adam.
            made = getattr(torch.optim, optimizer)([copies[2]], lr=0.1)
            for _ in range(3):
                result = product_key_attention(
                    copies[0], copies[1], copies[2], k=25, sparse_grad=is_sparse, implementation=implementation
                )
                made.zero_grad()
                (result.output - target).square().sum().backward()
                if optimizer == "SparseAdam" and not is_sparse:
                    assert copies[2].grad is not None
                    copies[2].grad = copies[2].grad.to_sparse(1)
                made.step()
            trained.append(copies[2].detach())
        assert not torch.equal(trained[0], inputs[2])
        torch.testing.assert_close(trained[0], trained[1])

    def test_adds_up_over_calls(self, implementation: str) -> None:
        inputs = leaves(dtype=torch.float32)
        by = torch.randn(2, 5, 11)
        for each in by:
            product_key_attention(
                inputs[0], inputs[1], inputs[2], k=4, sparse_grad=True, implementation=implementation
            ).output.backward(each)
        grad = inputs[2].grad
        assert grad is not None
        assert grad.is_sparse
        torch.testing.assert_close(
            grad.to_dense(), gradient_of_values(inputs, by[0] + by[1], implementation=implementation)
        )

    def test_has_no_derivative(self, native: Any) -> None:
        query, half_keys, values = leaves()
        result = product_key_attention(query, half_keys, values, k=4, sparse_grad=True, implementation="cpu")
        with pytest.raises(UnsupportedError, match="sparse_grad: such a gradient of the values has no derivative"):
            torch.autograd.grad(result.output.sum(), values, create_graph=True)
        # Without that of the values there are second derivatives.
        result = product_key_attention(query, half_keys, values.detach(), k=4, sparse_grad=True, implementation="cpu")
        (grad,) = torch.autograd.grad(result.output.sum(), query, create_graph=True)
        assert torch.autograd.grad(grad.square().sum(), query)[0].abs().sum() > 0

    def test_is_for_plain_backwards(self, native: Any) -> None:
        query, half_keys, values = leaves()
        result = product_key_attention(query, half_keys, values, k=4, sparse_grad=True)
        with pytest.raises(UnsupportedError, match="sparse_grad=True: how many rows"):
            torch.autograd.grad(result.output, values, torch.randn(2, 5, 11, dtype=_F64), is_grads_batched=True)
        with pytest.raises(UnsupportedError, match="sparse_grad: calls that are traced or transformed"):
            torch.func.grad(lambda x: product_key_attention(query, half_keys, x, k=4, sparse_grad=True).output.sum())(
                values
            )


class TestSlotGradient:
    def test_has_the_gradient_s_rows(self, implementation: str) -> None:
        inputs = leaves(30, 3, 2, 7, 11)
        by = torch.randn(30, 11, dtype=_F64)
        expected = gradient_of_values(inputs, by, implementation=implementation)
        received: list[SlotGradient] = []
        result = product_key_attention(
            inputs[0], inputs[1], inputs[2], k=4, slot_gradient=received.append, implementation=implementation
        )
        result.output.backward(by)
        plain = product_key_attention(inputs[0], inputs[1], inputs[2], k=4, implementation=implementation)
        others = torch.autograd.grad(plain.output, inputs[:2], by)
        torch.testing.assert_close((inputs[0].grad, inputs[1].grad), others)
        (gradient,) = received
        assert inputs[2].grad is None
        torch.testing.assert_close(gradient.to_sparse().to_dense(), expected)
        assert gradient.to_sparse().is_coalesced()
        for size in (1, 5, 1000):
            found, seen = torch.zeros_like(expected), []
            for slots, rows in gradient.parts(size):
                assert 0 < len(slots) <= size
                found[slots] = rows
                seen.append(slots)
            assert torch.equal(found, gradient.to_sparse().to_dense())
            assert torch.equal(torch.cat(seen), gradient.indices.unique())
        values = inputs[2].detach().clone()
        gradient.add_to_(values, alpha=-0.5)
        torch.testing.assert_close(values, inputs[2].detach() - 0.5 * expected)
        with pytest.raises(InvalidInputError, match="max_rows: expected an int of at least 1, got 0"):
            next(gradient.parts(0))

    def test_comes_where_the_values_alone_are_trained(self, implementation: str) -> None:
        query, half_keys, values = leaves()
        received: list[SlotGradient] = []
        settings: Any = {"k": 4, "slot_gradient": received.append, "implementation": implementation}
        product_key_attention(query.detach(), half_keys.detach(), values, **settings).output.sum().backward()
        assert len(received) == 1
        assert values.grad is None
        # Values that want no gradient hand on none.
        result = product_key_attention(query, half_keys, values.detach(), **settings)
        result.output.sum().backward()
        assert len(received) == 1
        assert query.grad is not None
        # Nor does a gradient of the weights alone, which is not theirs.
        weights = product_key_attention(query, half_keys, values, **settings).weights
        assert weights is not None
        weights.sum().backward()
        assert len(received) == 1

    def test_is_not_that_of_an_earlier_backward_without_the_values(self, implementation: str) -> None:
        query, half_keys, values = leaves()
        received: list[SlotGradient] = []
        result = product_key_attention(
            query, half_keys, values, k=4, slot_gradient=received.append, implementation=implementation
        )
        torch.autograd.grad(result.output.sum(), query, retain_graph=True)
        assert result.weights is not None
        result.weights.square().sum().backward(retain_graph=True)
        assert not received
        result.output.sum().backward()
        assert len(received) == 1

    def test_of_no_tokens(self, implementation: str) -> None:
        query, half_keys, values = leaves()
        received: list[SlotGradient] = []
        result = product_key_attention(
            query[:0], half_keys, values, k=4, slot_gradient=received.append, implementation=implementation
        )
        result.output.sum().backward()
        assert not received[0].to_sparse().to_dense().any()
        assert not list(received[0].parts())

    @pytest.mark.parametrize(
        ("changed", "error", "match"),
        [
            ({"indices": torch.zeros(2, 1, 3, dtype=torch.int32)}, InvalidInputError, "indices: expected torch.int64"),
            ({"indices": torch.zeros(2, 3, dtype=torch.int64)}, DimensionMismatchError, "indices: "),
            ({"indices": torch.zeros(3, 1, 3, dtype=torch.int64)}, DimensionMismatchError, "indices: "),
            ({"indices": torch.zeros(2, 1, 3, dtype=torch.int64, device="meta")}, InvalidInputError, "indices: "),
            ({"weights": torch.ones(2, 1, 3).half()}, InvalidInputError, "weights: expected torch.float32 or torch.fl"),
            ({"grad_output": torch.ones(1, 4)}, DimensionMismatchError, "grad_output: "),
            ({"grad_output": torch.ones(2, 4, dtype=_F64)}, InvalidInputError, "grad_output: "),
        ],
    )
    def test_factors_that_do_not_fit_are_refused(self, changed: Any, error: type[Exception], match: str) -> None:
        fitting = {
            "indices": torch.zeros(2, 1, 3, dtype=torch.int64),
            "weights": torch.ones(2, 1, 3),
            "grad_output": torch.ones(2, 4),
        }
        assert SlotGradient(**fitting, num_slots=9).to_sparse().to_dense().sum() == 24
        with pytest.raises(error, match=match):
            SlotGradient(**{**fitting, **changed}, num_slots=9)

    def test_may_change_the_values_at_once(self, implementation: str) -> None:
        inputs = leaves()
        by, before = torch.randn(5, 11, dtype=_F64), inputs[2].detach().clone()
        result = product_key_attention(inputs[0], inputs[1], inputs[2], k=4, implementation=implementation)
        expected = torch.autograd.grad(result.output, inputs, by)
        result = product_key_attention(
            inputs[0],
            inputs[1],
            inputs[2],
            k=4,
            slot_gradient=lambda gradient: gradient.add_to_(inputs[2], alpha=-0.5),
            implementation=implementation,
        )
        result.output.backward(by)
        torch.testing.assert_close(inputs[2].detach(), before - 0.5 * expected[2])
        for x, gradient in zip(inputs[:2], expected[:2], strict=True):
            torch.testing.assert_close(x.grad, gradient)

    def test_has_no_derivative(self, native: Any) -> None:
        query, half_keys, values = leaves()
        result = product_key_attention(query, half_keys, values, k=4, slot_gradient=print, implementation="cpu")
        with pytest.raises(UnsupportedError, match="slot_gradient: such a gradient of the values has no derivative"):
            torch.autograd.grad(result.output.sum(), values, create_graph=True, allow_unused=True)

    def test_has_the_factors_of_dropout(self, implementation: str) -> None:
        query, half_keys, values = leaves(30)
        by, received = torch.randn(30, 11, dtype=_F64), []
        settings: Any = {"k": 4, "dropout": 0.4, "implementation": implementation}
        torch.manual_seed(3)
        expected = product_key_attention(query, half_keys, values, **settings)
        torch.manual_seed(3)
        product_key_attention(query, half_keys, values, slot_gradient=received.append, **settings).output.backward(by)
        (grad,) = torch.autograd.grad(expected.output, values, by)
        torch.testing.assert_close(received[0].to_sparse().to_dense(), grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(implementation: str, dtype: torch.dtype) -> None:
    inputs = leaves(30, 3, 4, 7, 37, dtype)
    result = product_key_attention(inputs[0], inputs[1], inputs[2], k=4, implementation=implementation)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = by_all_slots(exact[0], exact[1], exact[2], 4)
    assert result.weights is not None
    assert result.output.dtype == result.weights.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(result.output.double(), expected.output, rtol=step, atol=step)
    by = torch.randn(30, 37, dtype=dtype)
    ours = torch.autograd.grad(result.output, inputs, by)
    theirs = torch.autograd.grad(expected.output, exact, by.double())
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=4 * step, atol=4 * step * float(other.abs().max()))


def test_values_that_are_columns_of_a_matrix(native: Any) -> None:
    query, half_keys, values = leaves(dtype=torch.float32)
    wide = torch.randn(49, 20)
    wide[:, 3:14] = values.detach()
    found = product_key_attention(query, half_keys, wide[:, 3:14], k=4)
    assert torch.equal(found.output, product_key_attention(query, half_keys, values, k=4).output)
    turned = values.detach().T.contiguous().T
    assert torch.equal(
        product_key_attention(query, half_keys, turned, k=4).output,
        product_key_attention(query, half_keys, values, k=4).output,
    )


class TestDropout:
    def test_both_implementations_drop_the_same_weights(self, native: Any) -> None:
        inputs = leaves(30)
        by, found = torch.randn(30, 11, dtype=_F64), []
        for implementation in ("cpu", "reference"):
            torch.manual_seed(5)
            result = product_key_attention(
                inputs[0], inputs[1], inputs[2], k=4, dropout=0.4, implementation=implementation
            )
            found.append([*result[:2], *torch.autograd.grad(result.output, inputs, by)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)

    def test_drops_that_part_and_returns_the_weights_before(self, implementation: str) -> None:
        query, half_keys, _ = leaves(400, 2)
        ones = torch.ones(49, 1, dtype=_F64)
        result = product_key_attention(query, half_keys, ones, k=1, dropout=0.3, implementation=implementation)
        # Of one slot the weight is 1: each head adds 0 or 1 / 0.7.
        heads = result.output.detach().flatten() * 0.7
        torch.testing.assert_close(heads, heads.round())
        assert 0.6 < float(heads.detach().mean()) / 2 < 0.8
        assert result.weights is not None
        assert (result.weights == 1).all()


def test_under_autocast_the_values_dtype_is_taken(implementation: str) -> None:
    query, half_keys, values = leaves(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = product_key_attention(query.bfloat16(), half_keys, values, k=4, implementation=implementation)
    expected = product_key_attention(query.bfloat16().float(), half_keys, values, k=4, implementation=implementation)
    assert torch.equal(result.output, expected.output)


class TestCompiled:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gives_the_same(self, implementation: str, dtype: torch.dtype) -> None:
        inputs = leaves(9, 2, 3, 5, 7, dtype)

        def call(query: Tensor, half_keys: Tensor, values: Tensor) -> Any:
            return product_key_attention(query, half_keys, values, k=4, implementation=implementation)[:2]

        by = torch.randn(9, 7, dtype=dtype), torch.randn(9, 2, 4, dtype=dtype)
        ours, theirs = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), call(*inputs)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, inputs, by), torch.autograd.grad(theirs, inputs, by))

    # PyTorch's own, of what it wraps after a break of the graph.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    def test_leaves_a_sparse_gradient_to_eager_mode(self, implementation: str) -> None:
        inputs = leaves(9, 2, 3, 5, 7)

        def call(query: Tensor, half_keys: Tensor, values: Tensor) -> Tensor:
            return product_key_attention(
                query, half_keys, values, k=4, sparse_grad=True, implementation=implementation
            ).output

        by = torch.randn(9, 7, dtype=_F64)
        ours, theirs = torch.compile(call, backend="aot_eager")(*inputs), call(*inputs)
        (found,), (expected,) = (torch.autograd.grad(x, inputs[2], by) for x in (ours, theirs))
        assert found.is_sparse
        torch.testing.assert_close(found.to_dense(), expected.to_dense())
        torch._dynamo.reset()  # what was compiled with a break would be taken again
        with pytest.raises(torch._dynamo.exc.Unsupported, match="product_key_attention"):
            torch.compile(call, backend="aot_eager", fullgraph=True)(*inputs)


def test_fake_tensors(native: Any) -> None:
    with FakeTensorMode():
        query, half_keys, values = leaves(dtype=torch.float32)
        result = product_key_attention(query, half_keys, values, k=4, dropout=0.1, implementation="cpu")
        assert result.indices is not None
        assert (result.output.shape, result.indices.dtype) == ((5, 11), torch.int64)
        assert torch.autograd.grad(result.output.sum(), values)[0].shape == values.shape


class TestTransforms:
    def test_of_torch_func(self) -> None:
        query, half_keys, values = (x.detach() for x in leaves(3, 2, 2, 3, 2))

        def call(query: Tensor, half_keys: Tensor, values: Tensor) -> Tensor:
            return product_key_attention(query, half_keys, values, k=4).output

        def oracle(query: Tensor, half_keys: Tensor, values: Tensor) -> Tensor:
            return by_all_slots(query, half_keys, values, 4).output

        given = query, half_keys, values
        for which in range(3):
            torch.testing.assert_close(
                torch.func.jacrev(call, which)(*given),
                torch.autograd.functional.jacobian(oracle, given)[which],  # pyright: ignore[reportArgumentType]
            )
        torch.testing.assert_close(
            torch.func.jvp(call, given, tuple(torch.ones_like(x) for x in given)),
            torch.func.jvp(oracle, given, tuple(torch.ones_like(x) for x in given)),
        )
        several = torch.randn(4, *query.shape, dtype=_F64)
        mapped = torch.func.vmap(call, (0, None, None))(several, half_keys, values)
        torch.testing.assert_close(mapped, torch.stack([call(x, half_keys, values) for x in several]))
        torch.testing.assert_close(
            torch.func.hessian(lambda x: call(x, half_keys, values).square().sum())(query),
            torch.func.hessian(lambda x: oracle(x, half_keys, values).square().sum())(query),
        )

    def test_forward_mode(self) -> None:
        query, half_keys, values = (x.detach() for x in leaves(3, 2, 2, 3, 2))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(query, torch.ones_like(query))
            found = forward_ad.unpack_dual(product_key_attention(dual, half_keys, values, k=4).output).tangent
            expected = forward_ad.unpack_dual(by_all_slots(dual, half_keys, values, 4).output).tangent
        torch.testing.assert_close(found, expected)

    def test_batched_cotangents(self, implementation: str) -> None:
        inputs = leaves()
        output = product_key_attention(inputs[0], inputs[1], inputs[2], k=4, implementation=implementation).output
        by = torch.randn(3, 5, 11, dtype=_F64)
        batched = torch.autograd.grad(output, inputs, by, is_grads_batched=True, retain_graph=True)
        for n, each in enumerate(by):
            alone = torch.autograd.grad(output, inputs, each, retain_graph=True)
            torch.testing.assert_close(tuple(x[n] for x in batched), alone)
