"""Models of other libraries as they are, and after the one line that switches them: a training step of each.

The plain step is the model's forward, a product with a fixed cotangent, and backward into fresh gradients.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from anyattention import Full, Window
from anyattention.interop.torch import MultiheadAttention, convert
from benchmarks.harness import Timing, measure, print_table, require_tests, write_result

Contestants = dict[str, Callable[[], object]]

WIDTH, HEADS, LAYERS, LENGTH = 256, 8, 6, 4096


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="the cases whose title has this in it")
    parser.add_argument("--dry", action="store_true", help="run no tests, and write no result")
    options = parser.parse_args(arguments)
    if not options.dry:
        require_tests("tests/interop/test_torch.py")
    cases: dict[str, dict[str, Timing]] = {}
    for title, contestants in CASES.items():
        if options.only in title:
            cases[title] = measure("anyattention", contestants(), rounds=options.rounds)
            print_table(title, cases[title])
    if not options.dry:
        write_result("switch", cases)


def encoder(length: int = LENGTH, width: int = WIDTH, layers: int = LAYERS) -> Contestants:
    """Dropout is 0: with dropout PyTorch forms the weights of all pairs of all layers, which take 10 GB here."""
    layer = nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, layers)
    x = torch.randn(1, length, width)
    windowed = convert(copy.deepcopy(model), Window(128, 128))
    for module in windowed.modules():
        if isinstance(module, MultiheadAttention):
            assert module.explain_forward(x, x, x, need_weights=False).implementation == "cpu"
    return {
        "anyattention": step(windowed, x),
        "anyattention, all pairs": step(convert(copy.deepcopy(model), Full()), x),
        "PyTorch": step(model, x),
    }


def step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    parameters = list(model.parameters())
    cotangent = torch.randn_like(x)
    return lambda: torch.autograd.grad(model(x), parameters, cotangent)


# Each makes its contestants when it is its turn; "anyattention" is the one that the others' times are divided by.
CASES: dict[str, Callable[[], Contestants]] = {
    f"nn.TransformerEncoder, {LAYERS} layers of {WIDTH}, {HEADS} heads, length {LENGTH:,}, Window(128, 128), "
    "training step": encoder,
}


if __name__ == "__main__":
    main()
