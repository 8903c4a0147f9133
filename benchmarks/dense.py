"""Dense attention: `attend` beside PyTorch's own, bare; our MultiHeadAttention beside torch.nn's; the matrix rate.

In bfloat16 the same call in float32 stands beside both.

The limit is the time that PyTorch's matrix product would take for the same multiplications: 4 B H L S D operations
forward, half of it causal, and 3.5 times as many forward and backward (5 products backward, 2 forward).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import anyattention
from anyattention import Causal, Pattern, Window, attend
from anyattention.nn import MultiHeadAttention
from benchmarks.harness import Timing, measure, print_table, require_tests, write_result

BATCH, HEADS, HEAD_DIM = 2, 8, 64


def main() -> None:
    require_tests("tests/ops", "-k", "dense")
    cases: dict[str, dict[str, Timing]] = {}
    for length in (128, 1024):
        for causal in (False, True):
            title = f"attend, length {length}{', causal' if causal else ''}"
            cases[f"{title}, forward"] = operation(length, causal=causal, backward=False)
            cases[f"{title}, forward+backward"] = operation(length, causal=causal, backward=True)
    cases["attend, length 1024, padding mask, forward"] = padded(1024)
    for name, batch, length, pattern in (
        ("length 1024", BATCH, 1024, None),
        ("length 8192, causal", 1, 8192, Causal()),
        ("length 8192, window of 256 on each side", 1, 8192, Window(256, 256)),
    ):
        for backward in (False, True):
            title = f"attend, bfloat16, {name}, forward{'+backward' if backward else ''}"
            cases[title] = half_precision(batch, length, pattern, backward=backward)
    for weights in (False, True):
        returned = "mean weights" if weights else "no weights"
        cases[f"module, length 1024, {returned}, forward"] = module(1024, weights=weights)
    cases["module of width 256, 4 x 1024, mean weights, training step"] = training_step(4, 1024)
    for title, results in cases.items():
        print_table(title, results)
    write_result("dense", cases)


def operation(length: int, *, causal: bool, backward: bool) -> dict[str, Timing]:
    query, key, value = inputs(length, backward)
    pattern = Causal() if causal else None
    heads_first = [x.detach().transpose(1, 2).requires_grad_(backward) for x in (query, key, value)]
    cotangent = torch.randn_like(query)
    assert anyattention.explain(query, key, value, pattern).implementation == "cpu"

    def step(forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
        if not backward:
            return forward
        return lambda: torch.autograd.grad(forward(), leaves, grad)

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
        return measure("anyattention", contestants)


def half_precision(batch: int, length: int, pattern: Pattern | None, *, backward: bool) -> dict[str, Timing]:
    """bfloat16, beside the same numbers in float32; PyTorch's takes a window as a mask."""
    full = [x[:batch] for x in inputs(length, False)]
    cotangent = torch.randn_like(full[0])
    causal = isinstance(pattern, Causal)
    mask = None if causal or pattern is None else pattern.to_dense(length, length)
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
        output = F.scaled_dot_product_attention(*leaves, attn_mask=mask, is_causal=causal)
        return torch.autograd.grad(output, leaves, grad) if backward else output

    contestants = {
        "anyattention": ours(torch.bfloat16),
        "anyattention in float32": ours(torch.float32),
        "torch SDPA, bare": theirs,
    }
    with torch.set_grad_enabled(backward):
        return measure("anyattention", contestants)


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


def training_step(batch: int, length: int) -> dict[str, Timing]:
    """Forward and backward of a loss on the output, with mean weights returned; beside ours without them, too."""
    x, cotangent = torch.randn(batch, length, 256), torch.randn(batch, length, 256)
    ours = MultiHeadAttention(256, HEADS, dropout=0.0)
    theirs = torch.nn.MultiheadAttention(256, HEADS, batch_first=True)

    def step(module: torch.nn.Module, forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), list(module.parameters()), cotangent)

    contestants = {
        "anyattention": step(ours, lambda: ours(x).output),
        "anyattention without weights": step(ours, lambda: ours(x, return_weights=False).output),
        "torch.nn.MultiheadAttention": step(theirs, lambda: theirs(x, x, x, need_weights=True)[0]),
    }
    return measure("anyattention", contestants)


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
