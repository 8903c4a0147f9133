"""`python -m examples.packages.apt --out FILE`: the typed graph of the packages that a machine's apt knows.

Works on Debian and what derives from it, after `apt-get update`. Reads the lists of all sources, which apt decompresses
itself.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anyattention.cli.arguments import count, seed
from anyattention.cli.command import Parser, run_command
from anyattention.errors import InvalidInputError
from anyattention.files import make_folder, write_atomically

__all__ = ["main", "make_arrays", "read_lists", "read_stanzas"]

_RELATIONS = {
    "depends": ("Depends", "Pre-Depends"),
    "recommends": ("Recommends",),
    "suggests": ("Suggests",),
    "enhances": ("Enhances",),
}
_WORD = re.compile(r"[a-z][a-z0-9+]{2,}")
_NAME = re.compile(r"[^\s(:\[<]+")
# Of those who provide a virtual package, how many stand for it.
_PROVIDERS = 3
# Words in more descriptions than this share are left out.
_COMMONEST = 0.15
_DESCRIPTION = """\
Write the packages that apt knows on this machine as a typed graph, for `python -m examples.packages --data FILE`. It
needs the lists that `apt-get update` fetches.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments, None for the process's; the exit code."""
    parser = Parser(prog="python -m examples.packages.apt", description=_DESCRIPTION)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .npz file to write")
    parser.add_argument(
        "--lists", type=Path, nargs="+", metavar="FILE", help="decompressed Packages files to read (default: apt's)"
    )
    parser.add_argument(
        "--section-packages", type=count, default=150, metavar="N", help="packages of a class, at least (default: 150)"
    )
    parser.add_argument(
        "--word-packages", type=count, default=25, metavar="N", help="descriptions of a word, at least (default: 25)"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the split (default: 0)")
    parser.set_defaults(run=_run)
    return run_command(parser, argv)


def _run(arguments: Namespace) -> int:
    texts = read_lists() if arguments.lists is None else [_read(path) for path in arguments.lists]
    stanzas = (stanza for text in texts for stanza in read_stanzas(text))
    arrays = make_arrays(
        stanzas,
        section_packages=arguments.section_packages,
        word_packages=arguments.word_packages,
        seed=arguments.seed,
    )
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    make_folder(arguments.out.parent)
    write_atomically(arguments.out, content.getvalue())
    print(
        f"{len(arrays['y']):,} packages, {arrays['num_sources']:,} sources, {arrays['num_maintainers']:,} maintainers"
    )
    for name, edges in arrays.items():
        if "__" in name:
            print(f"{edges.shape[1]:,} {name.split('__')[1]}")
    print(f"{arrays['words_shape'][1]:,} words, {len(arrays['classes'])} sections: written to {arguments.out}")
    return 0


def read_lists() -> list[str]:
    """The texts of apt's lists of packages, in the order of its sources.

    Raises:
        InvalidInputError: this machine has no apt, or no lists.
    """
    asked = ["apt-get", "indextargets", "--format", "$(FILENAME)", "Created-By: Packages"]
    try:
        names = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
        return [
            subprocess.run(
                ["/usr/lib/apt/apt-helper", "cat-file", name], capture_output=True, check=True
            ).stdout.decode("utf-8", errors="replace")
            for name in names
        ]
    except (OSError, subprocess.CalledProcessError) as fault:
        expected = "a machine with apt, of Debian or a distribution that derives from it"
        raise InvalidInputError(argument="apt", expected=expected, actual=str(fault)) from fault


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as fault:
        raise InvalidInputError(
            argument=str(path), expected="a readable file", actual=fault.strerror or str(fault)
        ) from fault


def read_stanzas(text: str) -> Iterator[dict[str, str]]:
    """The fields of each package of a list: `Name: value` lines, continued by lines that begin with a blank."""
    for block in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line[:1] in (" ", "\t"):
                if name:
                    fields[name] += "\n" + line.strip()
            elif ":" in line:
                name, value = line.split(":", 1)
                fields[name] = value.strip()
        if "Package" in fields:
            yield fields


def make_arrays(
    stanzas: Iterable[dict[str, str]], *, section_packages: int = 150, word_packages: int = 25, seed: int = 0
) -> dict[str, Any]:
    """The arrays of the file.

    Packages are in the order of their names; of several versions the first counts. A package links to each alternative
    that it names, and for a virtual one to the first three that provide it; to none twice, and not to itself. Sources
    and maintainers are numbered as they come.

    Args:
        stanzas: the fields of each package.
        section_packages: how many packages a section must have to be a class.
        word_packages: how many descriptions a word must be in. Words in more than 15 % of them are left out.
        seed: of the split, 10 % to learn from, 10 % for validation, of the packages that have a class.

    Raises:
        InvalidInputError: there are fewer than 10 packages with a class.
    """
    first: dict[str, dict[str, str]] = {}
    for stanza in stanzas:
        first.setdefault(stanza["Package"], stanza)
    packages = [first[name] for name in sorted(first)]
    sections = [each.get("Section", "").split("/")[-1] for each in packages]
    sizes = Counter(sections)
    classes = sorted(name for name, size in sizes.items() if name and size >= section_packages)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers.get(name, -1) for name in sections], dtype=np.int16)
    known = np.flatnonzero(labels >= 0)
    if len(known) < 10:
        expected = f"at least 10 packages of sections with {section_packages} packages or more"
        raise InvalidInputError(argument="lists", expected=expected, actual=f"{len(known)} of {len(packages)} packages")
    order, tenth = np.random.default_rng(seed).permutation(known), len(known) // 10
    sources = _numbered([each.get("Source", each["Package"]).split()[0] for each in packages])
    maintainers = _numbered([each.get("Maintainer", "") for each in packages])
    installed = [[float(each.get(name, 0)) for name in ("Installed-Size", "Size")] for each in packages]
    return {
        **_words([each.get("Description", "").split("\n")[0] for each in packages], word_packages),
        "sizes": np.log1p(np.array(installed)).astype(np.float32),
        "y": labels,
        "num_sources": np.int64(sources.max() + 1),
        "num_maintainers": np.int64(maintainers.max() + 1),
        "classes": np.array(classes),
        "train": np.sort(order[:tenth]),
        "val": np.sort(order[tenth : 2 * tenth]),
        "test": np.sort(order[2 * tenth :]),
        **{f"package__{name}__package": edges for name, edges in _links(packages).items()},
        "package__built_from__source": np.stack([np.arange(len(packages), dtype=np.int32), sources]),
        "package__kept_by__maintainer": np.stack([np.arange(len(packages), dtype=np.int32), maintainers]),
    }


def _numbered(names: list[str]) -> np.ndarray:
    """A number for each name, by its first occurrence."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.int32)


def _words(descriptions: list[str], least: int) -> dict[str, np.ndarray]:
    """Which of the words that are neither rare nor everywhere each description has, as sparse rows."""
    found = [set(_WORD.findall(text.lower())) for text in descriptions]
    counts = Counter(word for words in found for word in words)
    most = _COMMONEST * len(descriptions)
    numbers = {
        word: number
        for number, word in enumerate(sorted(w for w, n in counts.items() if least <= n <= max(most, least)))
    }
    rows = [sorted(numbers[word] for word in words if word in numbers) for words in found]
    return {
        "words_indptr": np.cumsum([0, *map(len, rows)]).astype(np.int32),
        "words_indices": np.array([number for row in rows for number in row], dtype=np.int16),
        "words_shape": np.array([len(rows), len(numbers)]),
    }


def _links(packages: list[dict[str, str]]) -> dict[str, np.ndarray]:
    """By relation `(2, edges)` int32: who names whom, each pair once, in order."""
    places = {each["Package"]: place for place, each in enumerate(packages)}
    providers: dict[str, list[int]] = {}
    for place, each in enumerate(packages):
        for name in dict.fromkeys(_names(each.get("Provides", ""))):
            providers.setdefault(name, []).append(place)
    found = {}
    for relation, fields in _RELATIONS.items():
        pairs = set()
        for place, each in enumerate(packages):
            for name in (name for field in fields for name in _names(each.get(field, ""))):
                named = [places[name]] if name in places else providers.get(name, [])[:_PROVIDERS]
                pairs.update((place, other) for other in named if other != place)
        found[relation] = np.array(sorted(pairs), dtype=np.int32).reshape(-1, 2).T.copy()
    return found


def _names(field: str) -> list[str]:
    """The packages that a field names, without versions, architectures and build profiles."""
    found = (_NAME.match(part.strip()) for part in re.split(r"[,|]", field))
    return [match.group() for match in found if match]


if __name__ == "__main__":
    sys.exit(main())
