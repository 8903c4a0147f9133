"""Sparse patterns: `attend` beside FlexAttention, local-attention and dense SDPA, at a length of 8,192, 8 heads x 64.

The limit is the time that PyTorch's matrix product takes for the multiplications of the allowed pairs: 4 of them a pair
and channel forward, 14 forward and backward; of TopK those of all scores, 2 a pair and channel. FlexAttention has no
gradients on the CPU; its compilation is not counted.

    python -m benchmarks.sparse [window lengths patterns causal documents decoding topk ...]
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from anyattention import (
    Causal,
    Documents,
    Fixed,
    Global,
    Pattern,
    RandomBlocks,
    Strided,
    TopK,
    Window,
    attend,
    explain,
)
from benchmarks.harness import RESULTS, Timing, measure, print_table, require_tests, write_result

Rule = Callable[[Tensor, Tensor], Tensor]

LENGTH, HEADS, WIDTH = 8192, 8, 64
WINDOW = 256


def main(names: list[str]) -> None:
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "window": window,
        "lengths": lengths,
        "patterns": patterns,
        "causal": causal,
        "documents": documents,
        "decoding": decoding,
        "topk": topk,
    }
    require_tests("tests/ops/test_run_attention.py", "tests/ops/test_topk_attention.py", "tests/patterns")
    path = RESULTS / "sparse.json"
    results: dict[str, Any] = json.loads(path.read_text())["cases"] if path.exists() else {}
    for name in names or list(cases):
        print(f"\n== {name}: {(cases[name].__doc__ or '').splitlines()[0]}")
        results[name] = cases[name]()
        for title, timings in results[name].items():
            if all(isinstance(timing, Timing) for timing in timings.values()):
                print_table(title, timings)
            else:
                print(title, json.dumps(timings, indent=1))
        write_result("sparse", results)


def window() -> dict[str, Any]:
    """A window of 256 keys on either side, forward, and forward and backward."""
    from local_attention import LocalAttention

    pattern = Window(WINDOW, WINDOW)
    rows = inputs(LENGTH)
    theirs = LocalAttention(WINDOW, look_backward=1, look_forward=1, use_rotary_pos_emb=False)
    first = heads_first(rows)
    contestants: dict[str, Callable[[], Tensor]] = {
        "anyattention": ours(rows, pattern),
        "FlexAttention": flex(first, lambda q, k: (q - k).abs() <= WINDOW),
        "local-attention (own blocks)": lambda: theirs(*first),
    }
    product = matrix_rate(pattern, 4)
    with torch.no_grad():
        forward = measure("anyattention", {**contestants, "matrix rate": product}, rounds=7)
    leaves = [x.requires_grad_() for x in rows]
    others = [x.detach().requires_grad_() for x in first]
    both = {
        "anyattention": step(ours(leaves, pattern), leaves),
        "anyattention, forward": lambda: ours([x.detach() for x in leaves], pattern)(),
        "local-attention (own blocks)": step(lambda: theirs(*others), others),
        "matrix rate": matrix_rate(pattern, 14),
    }
    return {"forward": forward, "forward+backward": measure("anyattention", both, rounds=5)}


def lengths() -> dict[str, Any]:
    """The same window from 1,024 to 131,072 positions: microseconds and KiB a position, forward."""
    found: dict[str, Any] = {}
    for length in (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072):
        rows = inputs(length)
        with torch.no_grad():
            timing = measure("anyattention", {"anyattention": ours(rows, Window(WINDOW, WINDOW))}, rounds=5)
        taken = timing["anyattention"]
        found[f"length {length}"] = {
            "microseconds a position": round(taken.median / length * 1e6, 3),
            "KiB a position": round((taken.peak_bytes or 0) / length / 1024, 2),
        }
    return found


def patterns() -> dict[str, Any]:
    """Other patterns, forward: beside dense SDPA's time for all pairs, its share of the allowed ones, FlexAttention."""
    stride = round(LENGTH**0.5)
    blocks = RandomBlocks(3, 0, 64).to_blocks(64, LENGTH, LENGTH)
    sizes = document_lengths(LENGTH, 256, 1024)
    document = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    cases: dict[str, tuple[Pattern, Rule]] = {
        "Strided, causal": (
            Strided(stride, stride) & Causal(),
            lambda q, k: ((q - k <= stride) | ((q - k) % stride == 0)) & (k <= q),
        ),
        "Fixed, causal": (
            Fixed(stride, 1) & Causal(),
            lambda q, k: ((q // stride == k // stride) | (k % stride == stride - 1)) & (k <= q),
        ),
        "Window and Global": (
            Window(128, 128) | Global(64),
            lambda q, k: ((q - k).abs() <= 128) | (q < 64) | (k < 64),
        ),
        "BigBird": (
            RandomBlocks(3, 0, 64) | Window(96, 96) | Global(128),
            lambda q, k: blocks[q // 64, k // 64] | ((q - k).abs() <= 96) | (q < 128) | (k < 128),
        ),
        "Documents": (Documents(sizes), lambda q, k: document[q] == document[k]),
    }
    found: dict[str, Any] = {}
    rows = inputs(LENGTH)
    first = heads_first(rows)
    for title, (pattern, rule) in cases.items():
        contestants = {
            "anyattention": ours(rows, pattern),
            "FlexAttention": flex(first, rule),
            "dense SDPA": lambda: F.scaled_dot_product_attention(first[0], first[1], first[2]),
        }
        with torch.no_grad():
            timings = measure("anyattention", contestants, rounds=5)
        found[title] = timings
        allowed = pattern.density(LENGTH) * timings["dense SDPA"].ratio
        found[f"{title}, over the share of dense SDPA"] = {"ratio": round(1 / allowed, 2)}
    return found


def causal() -> dict[str, Any]:
    """Causal attention over every earlier position, 8 heads x 32, beside SDPA."""
    found: dict[str, Any] = {}
    for length in (128, 256, 512, 1024):
        rows = inputs(length, width=32, batch=4)
        first = heads_first(rows)
        contestants = {
            "anyattention": ours(rows, Causal()),
            "dense SDPA, is_causal": lambda x=first: F.scaled_dot_product_attention(x[0], x[1], x[2], is_causal=True),
        }
        with torch.no_grad():
            found[f"length {length}"] = measure("anyattention", contestants)
    return found


def documents() -> dict[str, Any]:
    """Packed documents of 16 to 512 positions, and of 256 each, beside padding them into SDPA."""
    found: dict[str, Any] = {}
    for title, sizes in (
        ("log-uniform lengths", document_lengths(LENGTH, 16, 512)),
        ("equal lengths", (256,) * (LENGTH // 256)),
    ):
        rows = inputs(LENGTH)
        padded = [pad(x, sizes).transpose(1, 2) for x in rows]
        is_there = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
        mask = None if len(set(sizes)) == 1 else is_there[:, None, None]
        contestants = {
            "anyattention": ours(rows, Documents(sizes)),
            "padded SDPA": lambda x=padded, mask=mask: F.scaled_dot_product_attention(x[0], x[1], x[2], mask),
        }
        with torch.no_grad():
            found[title] = measure("anyattention", contestants, rounds=7)
    return found


def decoding() -> dict[str, Any]:
    """One more token with a window of 256, after 1,000 and after 100,000 others."""
    found: dict[str, Any] = {}
    for length in (1_000, 100_000):
        torch.manual_seed(0)
        query = torch.randn(1, 1, HEADS, WIDTH)
        key, value = torch.randn(2, 1, length, HEADS, WIDTH)
        pattern = Window(WINDOW, 0, align="bottom_right")
        contestants = {"anyattention": lambda q=query, k=key, v=value, p=pattern: attend(q, k, v, p).output}
        with torch.no_grad():
            found[f"after {length}"] = measure("anyattention", contestants)
    return found


def topk() -> dict[str, Any]:
    """The 32 best of 1,000,000 keys for 1,000 queries, 1 head x 64, forward: beside all scores at once, all keys."""
    torch.manual_seed(0)
    query = torch.randn(1, 1_000, 1, WIDTH)
    key, value = torch.randn(2, 1, 1_000_000, 1, WIDTH)
    first = heads_first([query, key, value])

    def chosen_from_scores() -> Tensor:
        best, indices = (query[0, :, 0] / WIDTH**0.5 @ key[0, :, 0].T).topk(32)
        return (best.softmax(-1)[..., None] * value[0, :, 0][indices]).sum(1)

    result = ours([query, key, value], TopK(32))()[0, :, 0]
    torch.testing.assert_close(result, chosen_from_scores(), rtol=1e-4, atol=1e-4)
    contestants: dict[str, Callable[[], Tensor]] = {
        "anyattention": ours([query, key, value], TopK(32)),
        "matrix product, torch.topk": chosen_from_scores,
        "dense SDPA, all keys": lambda: F.scaled_dot_product_attention(first[0], first[1], first[2]),
        "matrix rate": product_of(query.shape[1] * key.shape[1] * WIDTH),
    }
    with torch.no_grad():
        return {"forward": measure("anyattention", contestants, rounds=5)}


def inputs(length: int, *, width: int = WIDTH, batch: int = 1) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, length, HEADS, width) for _ in range(3)]


def heads_first(rows: list[Tensor]) -> list[Tensor]:
    return [x.detach().transpose(1, 2).contiguous() for x in rows]


def ours(rows: list[Tensor], pattern: Pattern | TopK) -> Callable[[], Tensor]:
    assert explain(rows[0], rows[1], rows[2], pattern).implementation == "cpu"
    return lambda: attend(rows[0], rows[1], rows[2], pattern).output


def flex(rows: list[Tensor], rule: Rule) -> Callable[[], Tensor]:
    """FlexAttention over the pairs of a rule, compiled."""
    length = rows[0].shape[2]
    mask = create_block_mask(lambda b, h, q, k: rule(q, k), None, None, length, length, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda: compiled(rows[0], rows[1], rows[2], block_mask=mask)  # pyright: ignore[reportReturnType]


def step(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    cotangent = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, cotangent)


def matrix_rate(pattern: Pattern, products: int) -> Callable[[], Tensor]:
    """A matrix product of as many multiplications as the pattern's pairs need."""
    return product_of(products // 2 * HEADS * WIDTH * pattern.spans(LENGTH, LENGTH).num_pairs)


def product_of(multiplications: int) -> Callable[[], Tensor]:
    """A square matrix product of so many multiplications."""
    side = round(multiplications ** (1 / 3))
    left, right = torch.randn(side, side), torch.randn(side, side)
    return lambda: left @ right


def document_lengths(whole: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Log-uniform lengths that add up to `whole`."""
    generator = random.Random(0)
    sizes: list[int] = []
    while sum(sizes) < whole:
        size = round(shortest * (longest / shortest) ** generator.random())
        sizes.append(min(size, whole - sum(sizes)))
    return tuple(sizes)


def pad(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Packed rows `(1, length, H, D)` as `(documents, longest, H, D)`."""
    return torch.nn.utils.rnn.pad_sequence(list(x[0].split(sizes)), batch_first=True)


if __name__ == "__main__":
    main(sys.argv[1:])
