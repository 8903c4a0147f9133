"""Dense attention: `attend` beside PyTorch's own, bare; our MultiHeadAttention beside torch.nn's; the matrix rate.

In bfloat16 the same call in float32 stands beside both.

The limit is the time that PyTorch's matrix product would take for the same multiplications: 4 B H L S D operations
forward, half of it causal, and 3.5 times as many forward and backward (5 products backward, 2 forward).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import anyattention
from anyattention import Causal, Pattern, Window, attend
from anyattention.nn import MultiHeadAttention
from benchmarks.harness import Timing, measure, print_table, require_tests, write_result

BATCH, HEADS, HEAD_DIM = 2, 8, 64


def main() -> None:
    require_tests("tests/ops", "-k", "dense")
    cases: dict[str, dict[str, Timing]] = {}

    def add(title: str, timed: dict[str, Timing]) -> None:
        print_table(title, timed)
        cases[title] = timed

    for length in (64, 128, 256, 512, 1024, 2048, 4096):
        for causal in (False, True):
            title = f"attend, length {length}{', causal' if causal else ''}"
            add(f"{title}, forward", operation(length, causal=causal, backward=False))
            add(f"{title}, forward+backward", operation(length, causal=causal, backward=True))
    add("attend, length 1024, padding mask, forward", padded(1024))
    for name, batch, length, pattern in (
        ("length 1024", BATCH, 1024, None),
        ("length 8192, causal", 1, 8192, Causal()),
        ("length 8192, window of 256 on each side", 1, 8192, Window(256, 256)),
    ):
        for backward in (False, True):
            title = f"attend, bfloat16, {name}, forward{'+backward' if backward else ''}"
            add(title, half_precision(batch, length, pattern, backward=backward))
    add("attend, length 1024, bias per head with gradient, forward+backward", biased(1024))
    add("attend, length 1024, gradient penalty", penalty(1024))
    add("attend, 1 x 512, dropout 0.1, forward", dropped(512))
    for weights in (False, True):
        returned = "mean weights" if weights else "no weights"
        add(f"module, length 1024, {returned}, forward", module(1024, weights=weights))
    for dropout in (0.1, 0.0):
        add(f"module of width 256, 4 x 1024, dropout {dropout}, training step", training_step(4, 1024, dropout))
    add("module of width 256, 1 x 4096, dropout 0.0, training step", training_step(1, 4096, 0.0))
    write_result("dense", cases)


def operation(length: int, *, causal: bool, backward: bool) -> dict[str, Timing]:
    query, key, value = inputs(length, backward)
    pattern = Causal() if causal else None
    heads_first = [x.detach().transpose(1, 2).requires_grad_(backward) for x in (query, key, value)]
    cotangent = torch.randn_like(query)
    assert anyattention.explain(query, key, value, pattern).implementation == "cpu"

    def step(forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
        return gradients(forward, leaves, grad) if backward else forward

    contestants = {
        "anyattention": step(lambda: attend(query, key, value, pattern).output, [query, key, value], cotangent),
        "torch SDPA, bare": step(
            lambda: F.scaled_dot_product_attention(*heads_first, is_causal=causal),
            heads_first,
            cotangent.transpose(1, 2),
        ),
        "matrix rate": product(length, (0.5 if causal else 1.0) * (3.5 if backward else 1.0)),
    }
    with torch.set_grad_enabled(backward):
        return measure("anyattention", contestants, rounds=7 if length > 1024 else 15)


def gradients(forward: Callable[[], Tensor], leaves: Sequence[Tensor], by: Tensor) -> Callable[[], object]:
    """What a training step computes."""
    return lambda: torch.autograd.grad(forward(), leaves, by)


def biased(length: int) -> dict[str, Timing]:
    """A learned bias for each head and pair, shared by the batch."""
    rows = inputs(length, True)
    bias = torch.randn(1, HEADS, length, length, requires_grad=True)
    heads_first = [x.detach().transpose(1, 2).requires_grad_() for x in rows]
    cotangent = torch.randn_like(rows[0])
    assert anyattention.explain(*rows, bias=bias).implementation == "cpu"
    return measure(
        "anyattention",
        {
            "anyattention": gradients(lambda: attend(*rows, bias=bias).output, [*rows, bias], cotangent),
            "anyattention, without bias": gradients(lambda: attend(*rows).output, rows, cotangent),
            "torch SDPA, bare": gradients(
                lambda: F.scaled_dot_product_attention(*heads_first, attn_mask=bias),
                [*heads_first, bias],
                cotangent.transpose(1, 2),
            ),
        },
    )


def penalty(length: int) -> dict[str, Timing]:
    """The gradients of the square of a gradient by the query, as a gradient penalty has them."""
    rows = inputs(length, True)
    heads_first = [x.detach().transpose(1, 2).requires_grad_() for x in rows]

    def step(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        def run() -> object:
            (by_query,) = torch.autograd.grad(forward().sum(), leaves[:1], create_graph=True)
            return torch.autograd.grad(by_query.square().sum(), leaves)

        return run

    def math() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*heads_first)

    contestants = {
        "anyattention": step(lambda: attend(*rows).output, rows),
        "torch SDPA, math": step(math, heads_first),
    }
    return measure("anyattention", contestants)


def dropped(length: int) -> dict[str, Timing]:
    rows = [x[:1] for x in inputs(length, False)]
    heads_first = [x.transpose(1, 2) for x in rows]
    contestants = {
        "anyattention": lambda: attend(*rows, dropout=0.1).output,
        "anyattention, without dropout": lambda: attend(*rows).output,
        "torch SDPA, bare": lambda: F.scaled_dot_product_attention(*heads_first, dropout_p=0.1),
    }
    with torch.no_grad():
        return measure("anyattention", contestants)


def half_precision(batch: int, length: int, pattern: Pattern | None, *, backward: bool) -> dict[str, Timing]:
    """bfloat16, beside the same numbers in float32."""
    full = [x[:batch] for x in inputs(length, False)]
    cotangent = torch.randn_like(full[0])
    causal = isinstance(pattern, Causal)
    assert anyattention.explain(*full, pattern).implementation == "cpu"

    def ours(dtype: torch.dtype) -> Callable[[], object]:
        leaves, grad = [x.to(dtype).requires_grad_(backward) for x in full], cotangent.to(dtype)

        def step() -> object:
            output = attend(*leaves, pattern).output
            return torch.autograd.grad(output, leaves, grad) if backward else output

        return step

    leaves = [x.bfloat16().transpose(1, 2).requires_grad_(backward) for x in full]
    grad = cotangent.bfloat16().transpose(1, 2)

    def theirs() -> object:
        output = F.scaled_dot_product_attention(*leaves, is_causal=causal)
        return torch.autograd.grad(output, leaves, grad) if backward else output

    contestants = {
        "anyattention": ours(torch.bfloat16),
        "anyattention, float32": ours(torch.float32),
    }
    if not isinstance(pattern, Window):
        contestants["torch SDPA, bare"] = theirs
    with torch.set_grad_enabled(backward):
        return measure("anyattention", contestants, rounds=7)


def padded(length: int) -> dict[str, Timing]:
    query, key, value = inputs(length, False)
    mask = torch.arange(length)[None] < torch.tensor([length, length // 2])[:, None]
    mask = mask[:, None, None]
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    contestants = {
        "anyattention": lambda: attend(query, key, value, mask=mask).output,
        "torch SDPA, bare": lambda: F.scaled_dot_product_attention(*heads_first, attn_mask=mask),
        "matrix rate": product(length, 1.0),
    }
    with torch.no_grad():
        return measure("anyattention", contestants)


def module(length: int, *, weights: bool) -> dict[str, Timing]:
    x = torch.randn(BATCH, length, HEADS * HEAD_DIM)
    ours = MultiHeadAttention(HEADS * HEAD_DIM, HEADS).eval()
    theirs = torch.nn.MultiheadAttention(HEADS * HEAD_DIM, HEADS, batch_first=True).eval()
    contestants = {
        "anyattention": lambda: ours(x, return_weights=weights).output,
        "torch.nn.MultiheadAttention": lambda: theirs(x, x, x, need_weights=weights)[0],
    }
    with torch.no_grad():
        return measure("anyattention", contestants)


def training_step(batch: int, length: int, dropout: float) -> dict[str, Timing]:
    """Forward and backward of a loss on the output, mean weights returned; and ours without weights, and dropout."""
    x, cotangent = torch.randn(batch, length, 256), torch.randn(batch, length, 256)
    ours, plain = (MultiHeadAttention(256, HEADS, dropout=each) for each in (dropout, 0.0))
    theirs = torch.nn.MultiheadAttention(256, HEADS, batch_first=True, dropout=dropout)

    def step(module: torch.nn.Module, forward: Callable[[], Tensor]) -> Callable[[], object]:
        return gradients(forward, list(module.parameters()), cotangent)

    contestants = {
        "anyattention": step(ours, lambda: ours(x).output),
        "anyattention, without weights": step(ours, lambda: ours(x, return_weights=False).output),
        "torch.nn.MultiheadAttention": step(theirs, lambda: theirs(x, x, x, need_weights=True)[0]),
    }
    if dropout:
        contestants["anyattention, without weights and dropout"] = step(
            plain, lambda: plain(x, return_weights=False).output
        )
    return measure("anyattention", contestants, rounds=7)


def inputs(length: int, requires_grad: bool) -> list[Tensor]:
    torch.manual_seed(0)
    shape = (BATCH, length, HEADS, HEAD_DIM)
    return [torch.randn(shape, requires_grad=requires_grad) for _ in range(3)]


def product(length: int, share: float) -> Callable[[], Tensor]:
    """A square matrix product of as many multiplications as the case has."""
    operations = share * 4 * BATCH * HEADS * length * length * HEAD_DIM
    side = round((operations / 2) ** (1 / 3))
    left, right = torch.randn(side, side), torch.randn(side, side)
    return lambda: left @ right


if __name__ == "__main__":
    main()
