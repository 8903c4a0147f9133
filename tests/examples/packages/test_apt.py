"""`python -m examples.packages.apt`: a small made-up list of packages, and what it says, worked out by hand."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from anyattention.errors import InvalidInputError
from examples.packages import apt
from examples.packages.apt import main, make_arrays, read_stanzas

# Out of order, two versions of `alpha`, a virtual package with four providers, alternatives, continued lines.
LIST = """\
Package: beta
Source: shared (2.0)
Maintainer: One <one@example.org>
Installed-Size: 10
Size: 99
Depends: alpha (>= 1.0) | gone,
 virtual:any, beta
Pre-Depends: alpha [amd64]
Recommends: alpha
Suggests: gone
Section: games
Description: tiny c++ game of tiny games
 A longer text with other words.

Package: alpha
Maintainer: Two <two@example.org>
Installed-Size: 3
Size: 7
Enhances: beta
Section: contrib/games
Description: game library

Package: alpha
Version: 2
Maintainer: Three <three@example.org>
Size: 1000
Section: web
Description: another version

""" + "\n".join(
    f"""\
Package: p{number}
Source: shared
Maintainer: One <one@example.org>
Provides: virtual (= 1), alpha
Section: {"web" if number < 9 else "rare"}
Description: The game, number{number}
"""
    for number in range(10)
)


def _made(**settings) -> dict[str, np.ndarray]:
    return make_arrays(read_stanzas(LIST), section_packages=2, word_packages=2, **settings)


def _words(arrays: dict[str, np.ndarray], row: int) -> list[int]:
    first, end = arrays["words_indptr"][row : row + 2]
    return arrays["words_indices"][first:end].tolist()


def test_packages_are_in_the_order_of_their_names_and_the_first_version_counts() -> None:
    arrays = _made()
    assert arrays["classes"].tolist() == ["games", "web"]
    # alpha, beta, p0 ... p9, of which the last has a section that is too small.
    assert arrays["y"].tolist() == [0, 0] + 9 * [1] + [-1]
    np.testing.assert_allclose(arrays["sizes"][:3], np.log([[4, 8], [11, 100], [1, 1]]), rtol=1e-6)


def test_links_are_those_of_the_fields() -> None:
    arrays = _made()
    # beta, number 1: alpha once; of the virtual package the first three providers, p0, p1 and p2; not itself.
    assert arrays["package__depends__package"].tolist() == [[1, 1, 1, 1], [0, 2, 3, 4]]
    assert arrays["package__recommends__package"].tolist() == [[1], [0]]
    assert arrays["package__suggests__package"].tolist() == [[], []]
    assert arrays["package__enhances__package"].tolist() == [[0], [1]]
    assert arrays["package__built_from__source"].tolist() == [list(range(12)), [0] + 11 * [1]]
    assert arrays["package__kept_by__maintainer"].tolist() == [list(range(12)), [0] + 11 * [1]]
    assert (arrays["num_sources"], arrays["num_maintainers"]) == (2, 2)


def test_words_are_those_of_enough_first_lines_and_not_of_too_many() -> None:
    # "game" is in all twelve and "the" in ten, more than 15 % and more than the least number; nothing is left.
    assert _made()["words_shape"].tolist() == [12, 0]
    arrays = make_arrays(read_stanzas(LIST), section_packages=2, word_packages=1)
    # By name: another version's words are not there, nor those of the longer text; "of" is too short.
    names = ["c++", "games", "library", *(f"number{number}" for number in range(10)), "tiny"]
    assert arrays["words_shape"].tolist() == [12, len(names)]
    assert [names[word] for word in _words(arrays, 0)] == ["library"]
    assert [names[word] for word in _words(arrays, 1)] == ["c++", "games", "tiny"]
    assert [names[word] for word in _words(arrays, 2)] == ["number0"]


def test_the_split_takes_each_package_with_a_class_once() -> None:
    parts = [_made(seed=3)[name] for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1, 1, 9]
    assert sorted(np.concatenate(parts).tolist()) == list(range(11))
    others = [_made(seed=4)[name].tolist() for name in ("train", "val")]
    assert others != [part.tolist() for part in parts[:2]]


def test_the_command_reads_files_and_says_what_it_found(tmp_path: Path, capsys) -> None:
    (tmp_path / "Packages").write_text(LIST)
    out = tmp_path / "new/small.npz"
    options = ["--lists", str(tmp_path / "Packages"), "--section-packages", "2", "--word-packages", "1"]
    assert main([*options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "12 packages, 2 sources, 2 maintainers\n4 depends\n1 recommends\n0 suggests\n" in printed
    with np.load(out, allow_pickle=False) as file:
        found, arrays = dict(file), make_arrays(read_stanzas(LIST), section_packages=2, word_packages=1)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_lists_are_those_that_apt_names(monkeypatch) -> None:
    def run(asked, **options):
        is_first = asked[0] == "apt-get"
        output = "one.lz4\ntwo.xz\n" if is_first else f"Package: of-{asked[-1]}\n".encode()
        return subprocess.CompletedProcess(asked, 0, stdout=output)

    monkeypatch.setattr(apt.subprocess, "run", run)
    assert apt.read_lists() == ["Package: of-one.lz4\n", "Package: of-two.xz\n"]


def test_a_machine_without_apt_is_told(tmp_path: Path, monkeypatch, capsys) -> None:
    def run(*arguments, **options):
        raise FileNotFoundError("no apt-get")

    monkeypatch.setattr(apt.subprocess, "run", run)
    assert main(["--out", str(tmp_path / "out.npz")]) == 2
    assert "apt: expected a machine with apt" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_list_is_named(tmp_path: Path, capsys) -> None:
    assert main(["--lists", str(tmp_path / "none"), "--out", str(tmp_path / "out.npz")]) == 2
    assert f"{tmp_path / 'none'}: expected a readable file" in capsys.readouterr().err


def test_too_few_packages_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least 10 packages of sections with 12 packages or more"):
        make_arrays(read_stanzas(LIST), section_packages=12)


def test_the_data_set_is_what_its_distribution_says(data_folder: Path) -> None:
    """The arrays that examples and benchmarks read have the keys and dtypes that the script writes."""
    with np.load(data_folder / "debian.npz", allow_pickle=False) as file:
        given = {
            name: (array.dtype.kind, array.dtype.itemsize * (array.dtype.kind != "U")) for name, array in file.items()
        }
    made = {name: np.asarray(array) for name, array in _made().items()}
    assert given == {
        name: (array.dtype.kind, array.dtype.itemsize * (array.dtype.kind != "U")) for name, array in made.items()
    }
