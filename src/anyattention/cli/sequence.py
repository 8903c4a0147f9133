"""`anyattention demo sequence`: a small language model with a window of attention, on Python's own source."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anyattention import explain
from anyattention.cli.training import require_extras
from anyattention.errors import InvalidInputError
from anyattention.patterns import Causal, Pattern
from anyattention.saving import make_folder, write_atomically
from anyattention.training.extras import import_demo
from anyattention.training.memory import peak_memory
from anyattention.training.sequence import (
    SequenceFit,
    SequenceModel,
    SequenceSettings,
    Step,
    bits_per_byte,
    draw_passages,
    fit_sequence,
    sample_bytes,
    train_step,
)
from anyattention.training.sequence_picture import Reference, draw_sequence
from anyattention.training.text import Text, load_source, pair_entropy, unigram_entropy

__all__ = ["run_sequence"]

# Passages of the held-out text, at most.
_SCORED = 40
# Beyond it the weights of all pairs take gigabytes.
_LONGEST_MATRIX = 4096


class _Scores(NamedTuple):
    """Bits per byte: at the end of the training, on the held-out text, and what simple counting takes."""

    train: float
    held_out: float
    unigram: float
    pairs: float


class _Cost(NamedTuple):
    """What one training step takes: the implementation that runs it, seconds, and bytes where they are known."""

    name: str
    seconds: float
    peak: int | None


def run_sequence(settings: SequenceSettings, threads: int | None, out: Path) -> int:
    """Train, and say how it went; the exit code.

    Raises:
        InvalidInputError: a passage is longer than the held-out text, or the folder cannot be written.
        MissingExtraError: matplotlib or tqdm is not installed.
        KeyboardInterrupt: Ctrl-C before a first step had finished.
    """
    require_extras()
    text = load_source()
    if settings.length >= len(text.held_out):
        expected = f"less than the held-out text's {len(text.held_out):,} bytes"
        raise InvalidInputError(argument="--length", expected=expected, actual=settings.length)
    folder = make_folder(out)
    if threads is not None:
        torch.set_num_threads(threads)
    print(_introduction(text, settings), flush=True)
    fit = _fit_with_bar(text, settings)
    scores = _score(fit, text, settings)
    tokens = len(fit.bits) * settings.batch * settings.length
    print(f"\n{tokens:,} bytes in {fit.seconds:.0f} s: {tokens / fit.seconds:,.0f} tokens per second.\n")
    print(_verdict(scores), flush=True)
    costs = _costs(text, settings)
    print(_comparison(costs, settings), flush=True)
    print(_sample(fit.model, text, settings), flush=True)
    _write(folder, fit, text, settings, scores, costs)
    print(f"The picture {folder / 'attention.png'} shows the pattern, the loss, and what one head attends to.")
    return 0


def _introduction(text: Text, settings: SequenceSettings) -> str:
    pattern, length = settings.pattern, settings.length
    heads = torch.zeros(1, length, settings.heads, settings.width // settings.heads, requires_grad=True)
    return f"""\
{len(text.train) + len(text.held_out):,} bytes of the source of Python's standard library; the last \
{len(text.held_out):,} are held out. A small network learns to
tell each byte from those before it, in passages of {length:,} bytes. Each byte attends to itself and the \
{settings.window:,} before it:
{pattern.density(length):.1%} of all pairs. The implementation that {explain(heads, heads, heads, pattern)}
"""


def _fit_with_bar(text: Text, settings: SequenceSettings) -> SequenceFit:
    tqdm = import_demo("tqdm", "the progress bar").tqdm
    # A log file is not redrawn in place, so it gets a line now and then.
    pause = 0.1 if sys.stderr.isatty() else 5.0
    with tqdm(total=settings.steps, desc="training", unit="step", mininterval=pause, file=sys.stderr) as bar:

        def show(step: Step) -> None:
            bar.set_postfix({"bits per byte": f"{step.bits:.2f}"}, refresh=False)
            bar.update()

        fit = fit_sequence(text.train, settings, show)
    if fit.interrupted:
        print(f"Interrupted after {len(fit.bits)} steps; what follows is about these.", file=sys.stderr)
    return fit


def _score(fit: SequenceFit, text: Text, settings: SequenceSettings) -> _Scores:
    scored = text.held_out[: _SCORED * settings.length + 1]
    return _Scores(
        train=statistics.fmean(fit.bits[-max(1, len(fit.bits) // 20) :]),
        held_out=bits_per_byte(fit.model, scored, settings.length),
        unigram=unigram_entropy(scored),
        pairs=pair_entropy(text.train, scored),
    )


def _verdict(scores: _Scores) -> str:
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


def _costs(text: Text, settings: SequenceSettings) -> list[_Cost]:
    """A training step over the window, and over every earlier byte, without and with the matrix of weights."""
    kinds: list[tuple[str, Pattern | None]] = [
        (f"the window of {settings.window:,}", settings.pattern),
        ("dense, causal", Causal()),
    ]
    if settings.length <= _LONGEST_MATRIX:
        kinds.append(("dense, causal, weights formed", None))
    return [_cost(name, pattern, text, settings) for name, pattern in kinds]


def _cost(name: str, pattern: Pattern | None, text: Text, settings: SequenceSettings) -> _Cost:
    model = SequenceModel(settings, pattern)
    optimizer = torch.optim.AdamW(model.parameters())
    passages = draw_passages(text.train, settings)
    train_step(model, optimizer, passages)
    started = time.monotonic()
    train_step(model, optimizer, passages)
    seconds = time.monotonic() - started
    optimizer.zero_grad(set_to_none=True)
    return _Cost(name, seconds, peak_memory(lambda: train_step(model, optimizer, passages)))


def _comparison(costs: list[_Cost], settings: SequenceSettings) -> str:
    lines = [f"One training step of the same model, by what a byte attends to (length {settings.length:,}):\n"]
    for cost in costs:
        memory = "memory not known here" if cost.peak is None else f"{cost.peak / 2**20:8,.0f} MiB at the peak"
        lines.append(f"  {memory}, {cost.seconds * 1000:6,.0f} ms  {cost.name}")
    if len(costs) > 2:
        lines.append("\nOnly the last forms the matrix of all pairs, as asking for dense attention's weights does.")
    return "\n".join([*lines, ""])


def _sample(model: SequenceModel, text: Text, settings: SequenceSettings) -> str:
    prompt = text.held_out[: max(1, min(256, settings.length // 2))]
    written = sample_bytes(model, prompt, min(160, settings.length - len(prompt)), seed=settings.seed)
    return "What it writes after the first held-out bytes:\n\n" + _quoted(written) + "\n"


def _quoted(written: bytes) -> str:
    """Bytes as indented lines, without what would steer a terminal."""
    lines = written.decode("utf-8", errors="replace").split("\n")
    return "\n".join("  | " + "".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines)


def _write(
    folder: Path, fit: SequenceFit, text: Text, settings: SequenceSettings, scores: _Scores, costs: list[_Cost]
) -> None:
    references = [
        Reference("held-out text: single bytes counted", scores.unigram),
        Reference("held-out text: pairs counted", scores.pairs),
        Reference("held-out text: this model", scores.held_out),
    ]
    metrics: dict[str, Any] = {
        "bits_per_byte": scores._asdict(),
        "tokens_per_second": len(fit.bits) * settings.batch * settings.length / fit.seconds,
        "step": [cost._asdict() for cost in costs],
        "steps": len(fit.bits),
        "interrupted": fit.interrupted,
        "settings": vars(settings),
    }
    write_atomically(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    passage = text.held_out[: settings.length]
    write_atomically(folder / "attention.png", draw_sequence(fit, passage, references))
