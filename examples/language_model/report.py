"""What the language model's training came to: scores and costs, in numbers and in words."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch

from anyattention import Causal, Pattern, explain
from benchmarks.peak_memory import peak_memory
from examples.language_model.generate import generate, speed_of_reading_again
from examples.language_model.model import LanguageModel, Settings
from examples.language_model.text import Text, pair_entropy, unigram_entropy
from examples.language_model.train import Fit, bits_per_byte, draw_passages, train_step

__all__ = [
    "Cost",
    "Scores",
    "describe_costs",
    "describe_sample",
    "describe_scores",
    "describe_text",
    "measure_costs",
    "measure_scores",
]

# Passages of the held-out text, at most.
_SCORED = 40
# Beyond it the weights of all pairs take gigabytes.
_LONGEST_MATRIX = 4096


class Scores(NamedTuple):
    """Bits per byte: at the end of the training, on the held-out text, and what simple counting takes."""

    train: float
    held_out: float
    unigram: float
    pairs: float


class Cost(NamedTuple):
    """What one training step takes: the implementation that runs it, seconds, and bytes where they are known."""

    name: str
    seconds: float
    peak: int | None


def describe_text(text: Text, settings: Settings) -> str:
    """What is learnt, and which implementation runs."""
    pattern, length = settings.pattern, settings.length
    heads = torch.zeros(1, length, settings.heads, settings.width // settings.heads, requires_grad=True)
    return f"""\
{len(text.train) + len(text.held_out):,} bytes of the source of Python's standard library; the last \
{len(text.held_out):,} are held out. A small network learns to
tell each byte from those before it, in passages of {length:,} bytes. Each byte attends to itself and the \
{settings.window:,} before it:
{pattern.density(length):.1%} of all pairs. The implementation that {explain(heads, heads, heads, pattern)}
"""


def measure_scores(fit: Fit, text: Text, settings: Settings) -> Scores:
    """The scores of a training, over the first passages of the held-out text."""
    scored = text.held_out[: _SCORED * settings.length + 1]
    return Scores(
        train=statistics.fmean(fit.bits[-max(1, len(fit.bits) // 20) :]),
        held_out=bits_per_byte(fit.model, scored, settings.length),
        unigram=unigram_entropy(scored),
        pairs=pair_entropy(text.train, scored),
    )


def describe_scores(scores: Scores) -> str:
    """The scores as a table, and a verdict."""
    if scores.held_out < min(scores.unigram, scores.pairs):
        words = f"On text it never saw, it needs {scores.pairs - scores.held_out:.2f} bits fewer than counting pairs."
    elif scores.held_out < scores.unigram:
        words = "It learnt more than how often each byte occurs, but less than counting pairs tells: train for longer."
    else:
        words = "It has not learnt more than how often each byte occurs: train for longer."
    return f"""\
Bits per byte, fewer are better:

  {scores.train:5.2f}  training, the last steps
  {scores.held_out:5.2f}  held-out text
  {scores.pairs:5.2f}  held-out text, guessed from the byte before by counting pairs in the training text
  {scores.unigram:5.2f}  held-out text, guessed from how often each byte occurs in it

{words}
"""


def measure_costs(text: Text, settings: Settings) -> list[Cost]:
    """A training step over the window, and over every earlier byte, without and with the matrix of weights."""
    kinds: list[tuple[str, Pattern | None]] = [
        (f"the window of {settings.window:,}", settings.pattern),
        ("dense, causal", Causal()),
    ]
    if settings.length <= _LONGEST_MATRIX:
        kinds.append(("dense, causal, weights formed", None))
    return [_measure_cost(name, pattern, text, settings) for name, pattern in kinds]


def _measure_cost(name: str, pattern: Pattern | None, text: Text, settings: Settings) -> Cost:
    model = LanguageModel(settings, pattern)
    optimizer = torch.optim.AdamW(model.parameters())
    passages = draw_passages(text.train, settings)
    train_step(model, optimizer, passages)
    started = time.monotonic()
    train_step(model, optimizer, passages)
    seconds = time.monotonic() - started
    optimizer.zero_grad(set_to_none=True)
    return Cost(name, seconds, peak_memory(lambda: train_step(model, optimizer, passages)))


def describe_costs(costs: list[Cost], settings: Settings) -> str:
    """The costs as a table."""
    lines = [f"One training step of the same model, by what a byte attends to (length {settings.length:,}):\n"]
    for cost in costs:
        memory = "memory not known here" if cost.peak is None else f"{cost.peak / 2**20:8,.0f} MiB at the peak"
        lines.append(f"  {memory}, {cost.seconds * 1000:6,.0f} ms  {cost.name}")
    if len(costs) > 2:
        lines.append("\nOnly the last forms the matrix of all pairs, as asking for dense attention's weights does.")
    return "\n".join([*lines, ""])


def describe_sample(model: LanguageModel, text: Text, settings: Settings) -> str:
    """What the model writes after the beginning of the held-out text, and how fast."""
    count = max(1, min(160, settings.length // 2))
    prompt = text.held_out[: settings.length - count]
    written = generate(model, prompt, count, seed=settings.seed)
    again = speed_of_reading_again(model, prompt)
    return f"""\
What it writes after the first {len(prompt):,} held-out bytes:

{_quoted(written.text)}

It read them in {written.reading * 1000:,.0f} ms, and wrote {count / written.writing:,.0f} bytes per second from what \
it kept of them: the keys and values
that the window reaches. Reading the text again for each byte makes {again:,.0f} per second.
"""


def _quoted(written: bytes) -> str:
    """Bytes as indented lines, without what would steer a terminal."""
    lines = written.decode("utf-8", errors="replace").split("\n")
    return "\n".join("  | " + "".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines)
