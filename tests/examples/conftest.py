"""Fixtures for the tests of the examples."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.packages.apt import make_arrays


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The commands choose their number of threads for the process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def packages_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 60 made-up packages in 3 sections, as `examples.packages.apt` writes it."""
    rng = np.random.default_rng(5)
    letters = "abcdefghijklmnopqrstuvwxyz"
    fields = ("Depends", "Pre-Depends", "Recommends", "Suggests", "Enhances")
    stanzas = []
    for number in range(60):
        stanza = {"Package": f"p{number:02}", "Section": f"s{number % 3}", "Size": f"{rng.integers(9, 999)}"}
        # Each word of a section is in few descriptions. The last two have no words, and the last of all no links.
        if number < 58:
            own, *others = letters[number % 3 + 3 * (number // 3 % 4)], *rng.choice(list(letters[12:]), 2)
            stanza["Description"] = " ".join(f"word{letter}" for letter in (own, *others))
        for field in fields if number < 59 else ():
            stanza[field] = ", ".join(f"p{other:02}" for other in rng.choice(59, rng.integers(4), replace=False))
        stanza["Source"] = f"source{rng.integers(20)}"
        stanza["Maintainer"] = f"maintainer{rng.integers(5)}"
        stanzas.append(stanza)
    path = tmp_path_factory.mktemp("packages") / "small.npz"
    np.savez(path, **make_arrays(stanzas, section_packages=5, word_packages=2))
    return path
