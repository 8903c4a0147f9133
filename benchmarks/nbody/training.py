"""Trains one contestant for a span of time, in steps that can be taken up again where they were left."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from anyattention.files import write_atomically
from benchmarks.nbody.data import Systems

__all__ = ["MARKS", "Data", "Mark", "Training"]

# Seconds of training after which the contestants are examined.
MARKS = (15, 30, 60, 120, 180, 240, 300, 450, 600, 900, 1200, 1800)
BATCH, LARGEST_GRADIENT, AVERAGED_STEPS = 100, 1.0, 1000
SECONDS_BETWEEN_SAVES = 30


class Data(NamedTuple):
    """Systems to learn from, to choose by, and to report on."""

    train: Systems
    validation: Systems
    test: Systems


class Mark(NamedTuple):
    """An examination: for which of `MARKS`, seconds and steps so far, mean squared errors of the averaged weights."""

    mark: int
    seconds: float
    steps: int
    validation: float
    test: float


class Training:
    """A network in training by Adam, and the running average of its weights, which is what is examined.

    The rate is constant, so that each mark is what that much time gives. Each step draws its batch anew.
    """

    def __init__(self, model: nn.Module, learning_rate: float, seed: int) -> None:
        self.model, self.average = model, copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps, self.seconds, self.marks = 0, 0.0, list[Mark]()

    def run(self, data: Data, seconds: float, save_to: Path, on_step: Callable[[float], None]) -> None:
        """Train until so many seconds have been spent on steps, examine at each mark, and keep it all in a file.

        The clock stands still during examinations. A KeyboardInterrupt of `on_step` ends the training early.
        """
        saved = self.seconds
        self.examine(data)
        try:
            while self.seconds < seconds:
                started = time.monotonic()
                self.step(data.train)
                taken = time.monotonic() - started
                self.seconds += taken
                self.examine(data)
                on_step(taken)
                if self.seconds - saved > SECONDS_BETWEEN_SAVES:
                    self.save(save_to)
                    saved = self.seconds
        finally:
            self.save(save_to)

    def step(self, systems: Systems) -> None:
        """One step of Adam, and of the average."""
        batch = systems.select(torch.randperm(len(systems.charges), generator=self.generator)[:BATCH])
        self.optimizer.zero_grad(set_to_none=True)
        error(self.model, batch).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()
        self.steps += 1
        share = max(1 / AVERAGED_STEPS, 9 / (9 + self.steps))
        with torch.no_grad():
            for average, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
                average.lerp_(weight, share)

    def examine(self, data: Data) -> None:
        """Add what the training's time has reached of `MARKS`."""
        while len(self.marks) < len(MARKS) and MARKS[len(self.marks)] <= self.seconds:
            with torch.no_grad():
                found = [error(self.average, part).item() for part in (data.validation, data.test)]
            self.marks.append(Mark(MARKS[len(self.marks)], self.seconds, self.steps, *found))

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on, and the marks."""
        tensors = {f"average.{name}": x for name, x in self.average.state_dict().items()}
        tensors |= {f"model.{name}": x for name, x in self.model.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": x for name, x in moments.items()}
        tensors["generator"] = self.generator.get_state()
        progress = {"steps": self.steps, "seconds": self.seconds, "marks": self.marks}
        write_atomically(path, save(tensors, {"progress": json.dumps(progress)}))

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote of the same kind of network."""
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
            progress = json.loads(file.metadata()["progress"])
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "adam": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if rest:
                parts[kind][rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.average.load_state_dict(parts["average"])
        state = self.optimizer.state_dict()
        for name, tensor in parts["adam"].items():
            number, _, moment = name.partition(".")
            state["state"].setdefault(int(number), {})[moment] = tensor
        self.optimizer.load_state_dict(state)
        self.generator.set_state(tensors["generator"])
        self.steps, self.seconds = progress["steps"], progress["seconds"]
        self.marks = [Mark(*mark) for mark in progress["marks"]]


def error(model: nn.Module, systems: Systems) -> Tensor:
    """The mean squared error of a coordinate."""
    charges, positions, velocities, targets = systems
    parts = zip(*(x.split(500) for x in (charges, positions, velocities, targets)), strict=True)
    total = torch.stack([(model(q, x, v) - y).square().sum() for q, x, v, y in parts]).sum()
    return total / targets.numel()
