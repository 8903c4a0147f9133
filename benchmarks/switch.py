"""Models of PyTorch's parts, switched by one line: a training step of an encoder as it is, and converted with a window."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from anyattention import Window
from anyattention.interop.torch import convert
from benchmarks.harness import Timing, measure, print_table, require_tests, write_result

LAYERS, WIDTH, HEADS, LENGTH = 6, 256, 8, 4096


def main() -> None:
    require_tests("tests/interop/test_torch.py")
    cases = {f"encoder, length {LENGTH:,}, training step": encoder()}
    for title, results in cases.items():
        print_table(title, results)
    write_result("switch", cases)


def encoder() -> dict[str, Timing]:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
    theirs = nn.TransformerEncoder(layer, LAYERS)
    x = torch.randn(1, LENGTH, WIDTH)
    windowed = convert(copy.deepcopy(theirs), Window(128, 128))
    explanation = windowed.layers[0].self_attn.explain_forward(x, x, x, need_weights=False)  # pyright: ignore
    assert explanation.implementation == "cpu"
    contestants = {
        "anyattention": step(windowed, x),
        "anyattention, all pairs": step(convert(copy.deepcopy(theirs)), x),
        "torch.nn": step(theirs, x),
    }
    return measure("anyattention", contestants, rounds=5)


def step(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    model.train()
    cotangent = torch.randn_like(x)

    def call() -> object:
        model.zero_grad()
        return model(x).backward(cotangent)

    return call


if __name__ == "__main__":
    main()
