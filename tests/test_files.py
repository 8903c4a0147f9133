"""Files that belong together: whatever ends the process, the folder has the old ones or the new ones."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from anyattention import load, save
from anyattention.errors import InvalidInputError
from anyattention.files import write_together
from anyattention.nn import MultiHeadAttention


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_first_file_decides(tmp_path: Path, monkeypatch) -> None:
    write_together(tmp_path, {"model": b"old", "metrics": b"old", "picture": b"old"})
    seen: list[set[str]] = []
    replace = Path.replace

    def look(path: Path, target: Path) -> Path:
        seen.append({name for name in names(tmp_path) if not name.startswith(".")})
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", look)
    write_together(tmp_path, {"model": b"new", "metrics": b"new"}, without=("metrics", "picture"))
    assert seen == [{"model"}, {"model"}]
    assert names(tmp_path) == {"model", "metrics"}


def test_what_a_killed_process_left_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / ".anyattention-0123").write_bytes(b"half")
    (tmp_path / ".somebody's").write_bytes(b"theirs")
    write_together(tmp_path, {"model": b"new"})
    assert names(tmp_path) == {"model", ".somebody's"}


def test_writers_wait_for_each_other(tmp_path: Path) -> None:
    """Two threads, each with files that belong together: never some of each."""

    def write(content: bytes) -> None:
        for _ in range(50):
            write_together(tmp_path, {"one": content, "two": content})

    threads = [threading.Thread(target=write, args=(content,)) for content in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == {"one", "two"}
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_all_is_written(number: signal.Signals, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    fsync = os.fsync

    def signalled(descriptor: int) -> None:
        os.kill(os.getpid(), number)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", signalled)
    try:
        with pytest.raises(KeyboardInterrupt, match=r"one, two in .* are whole"):
            write_together(tmp_path, {"one": b"new", "two": b"new"})
        assert signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, before)
    assert names(tmp_path) == {"one", "two"}


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="absent/file: expected a writable file, got No such file"):
        write_together(tmp_path / "absent", {"file": b""})


_SAVES = """
import sys, itertools, torch
from anyattention import save
from anyattention.nn import MultiHeadAttention
torch.set_num_threads(1)
models = []
for heads in (2, 4, 8):
    model = MultiHeadAttention(8, heads)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, heads)
    models.append(model)
print("ready", flush=True)
for model in itertools.cycle(models):
    save(model, sys.argv[1])
"""


def kills(folder: Path, count: int, seed: int = 0) -> list[str]:
    """What is wrong after each of so many kills of a process that saves models in turn."""
    generator, wrong = random.Random(seed), []
    save(MultiHeadAttention(8, 2), folder)
    for _ in range(count):
        with subprocess.Popen([sys.executable, "-c", _SAVES, str(folder)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(generator.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
        model = load(folder)
        held = {float(x) for parameter in model.parameters() for x in parameter.detach().flatten()}
        if held != {float(model.config.num_heads)}:
            wrong.append(f"{model.config.num_heads} heads with the weights of {held}")
    save(MultiHeadAttention(8, 2), folder)
    if names(folder) != {"model.safetensors", "config.json"}:
        wrong.append(f"left over: {names(folder)}")
    return wrong


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.*config.json is not what")
def test_a_kill_leaves_the_old_model_or_the_new_one(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        assert kills(tmp_path, 10) == []
