"""What tells the code that torch.compile kept on disk for this version of the operators from that for another.

PyTorch finds a compiled graph again by the names of its operators. Their schemas and the rules of their gradients are
in the compiled code but not in the key: after an upgrade, the code of the version before would run.
"""

from hashlib import blake2b
from pathlib import Path

from torch.compiler import config

__all__ = ["digest_of", "separate_compiled_graphs"]


def separate_compiled_graphs() -> None:
    """Adds the digest of this package's Python sources to the key of every compiled graph of this process."""
    tag = f"anyattention-{digest_of(Path(__file__).parents[1])}"
    if tag not in config.cache_key_tag:
        config.cache_key_tag += tag


def digest_of(folder: Path) -> str:
    """A digest of the names and the contents of a folder's Python files."""
    digest = blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        name, source = str(path.relative_to(folder)).encode(), path.read_bytes()
        for part in (name, source):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
