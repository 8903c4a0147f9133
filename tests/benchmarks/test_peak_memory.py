import sys

import pytest
import torch

from benchmarks.peak_memory import peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_peak_memory_is_that_of_the_call() -> None:
    held = torch.ones(1 << 22)
    peak = peak_memory(lambda: torch.ones(1 << 24).sum())
    assert held.sum() == 1 << 22
    if peak is not None:
        assert (1 << 26) * 0.9 < peak < (1 << 26) * 2


def test_none_where_the_system_does_not_tell(monkeypatch) -> None:
    def refuse(path, text):
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert peak_memory(lambda: None) is None
