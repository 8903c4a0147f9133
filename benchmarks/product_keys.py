"""Product-key memory: a million slots, beside plain PyTorch with embedding_bag and its sparse gradient.

`python -m benchmarks.product_keys`. The gradient of the values is sparse, in both, or in factors (`slot_gradient`),
from which rows are made as they are asked for. Forward and backward are measured alone, and with a step of gradient
descent on the values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattention.ops.product_keys import SlotGradient, explain_product_keys, product_key_attention
from benchmarks.harness import measure, print_table, require_tests, write_result

TOKENS, HEADS, KEY_DIM, HALF_KEYS, VALUE_DIM, K = 1024, 4, 128, 1024, 256, 32
RATE = 1e-3


def main() -> None:
    require_tests("tests/ops/test_product_keys.py", "tests/ops/test_product_keys_calls.py")
    torch.manual_seed(0)
    query = torch.randn(TOKENS, HEADS, KEY_DIM, requires_grad=True)
    half_keys = torch.randn(2, HEADS, HALF_KEYS, KEY_DIM // 2, requires_grad=True)
    values = torch.randn(HALF_KEYS**2, VALUE_DIM, requires_grad=True)
    by = torch.randn(TOKENS, VALUE_DIM)
    assert explain_product_keys(query, half_keys, values, k=K).implementation == "cpu"
    inputs = (query, half_keys, values)
    ours = product_key_attention(query, half_keys, values, k=K).output
    torch.testing.assert_close(ours, plain_output(*inputs), rtol=1e-4, atol=1e-4)
    cases: dict[str, Any] = {}
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for step in (False, True):
            title = f"forward+backward{', step' if step else ''}, {threads} {'threads' if threads > 1 else 'thread'}"
            cases[title] = measure("anyattention", contestants(inputs, by, step), rounds=9, seconds=0.0)
            print_table(title, cases[title])
    used = int(product_key_attention(query, half_keys, values, k=K).indices.unique().numel())  # pyright: ignore[reportOptionalMemberAccess]
    sizes = {"entries": TOKENS * HEADS * K, "used slots": used, "MiB of their rows": 4 * used * VALUE_DIM / 2**20}
    write_result("product_keys", {"training": cases, "sizes": sizes})


def contestants(inputs: tuple[Tensor, Tensor, Tensor], by: Tensor, step: bool) -> dict[str, Callable[[], object]]:
    query, half_keys, values = inputs

    def sparse() -> None:
        product_key_attention(query, half_keys, values, k=K, sparse_grad=True).output.backward(by)
        finish()

    def factors() -> None:
        product_key_attention(query, half_keys, values, k=K, slot_gradient=take).output.backward(by)
        finish()

    def plain() -> None:
        plain_output(query, half_keys, values).backward(by)
        finish()

    def take(gradient: SlotGradient) -> None:
        if step:
            gradient.add_to_(values, alpha=-RATE)

    def finish() -> None:
        if step and values.grad is not None:
            with torch.no_grad():
                values.add_(values.grad, alpha=-RATE)  # what torch.optim.SGD does
        for x in inputs:
            x.grad = None

    return {"anyattention": sparse, "anyattention, in factors": factors, "PyTorch": plain}


def plain_output(query: Tensor, half_keys: Tensor, values: Tensor) -> Tensor:
    """The products of halves, two top-k's, a softmax and a bag."""
    halves = query.unflatten(-1, (2, -1))
    (first, i), (second, j) = (
        torch.einsum("thd,hnd->thn", halves[:, :, half], half_keys[half]).topk(K) for half in range(2)
    )
    best, places = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2).topk(K)
    slots = (i.unsqueeze(-1) * HALF_KEYS + j.unsqueeze(-2)).flatten(-2).gather(-1, places)
    return F.embedding_bag(
        slots.flatten(1), values, mode="sum", sparse=True, per_sample_weights=best.softmax(-1).flatten(1)
    )


if __name__ == "__main__":
    main()
