"""Settings of sparse attention over sequences."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from anyattention.config.attention import AttentionConfig
from anyattention.errors import InvalidConfigError
from anyattention.settings import Config, documented, require_defaults

__all__ = ["SparseAttentionConfig", "SparsityPattern"]

SparsityPattern = Literal["local", "strided", "fixed", "global", "block", "top_k"]


_USED_BY: dict[str, tuple[str, ...]] = {
    "local": ("local_window",),
    "strided": ("block_size", "local_window"),
    "fixed": ("block_size", "num_global_tokens"),
    "global": ("local_window", "num_global_tokens"),
    "block": ("block_size",),
    "top_k": ("top_k",),
}


@documented
@dataclass(frozen=True)
class SparseAttentionConfig(Config):
    """Settings of sparse attention over sequences.

    Args: the fields.

    A setting that the pattern does not use must keep its default.

    Raises:
        InvalidConfigError: a value is out of range, missing, or set and cannot be used.

    Example:
        >>> SparseAttentionConfig(sparsity_pattern="top_k", top_k=32).top_k
        32
    """

    base: Annotated[
        AttentionConfig,
        'the settings of dense attention; `causal` joins the pattern with "and", and `max_seq_len` is also the length '
        "at which `nn.SparseAttention` states its sparsity",
    ] = field(default_factory=AttentionConfig)
    sparsity_pattern: Annotated[
        SparsityPattern,
        '"local" (a window), "strided", "fixed", "global" (a window and global tokens), "block" (block-diagonal) or '
        '"top_k"',
    ] = "local"
    block_size: Annotated[int, 'the stride of "strided", the block of "fixed" and "block"'] = 64
    local_window: Annotated[int, 'keys on either side of "local" and "global", recent keys of "strided"'] = 128
    num_global_tokens: Annotated[
        int | None,
        'summary tokens per block of "fixed" (None is 1, at most block_size); required by "global"',
    ] = None
    top_k: Annotated[
        int | None,
        'keys that each query keeps, fewer where not as many are allowed; required by "top_k", None else',
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        used = ("base", "sparsity_pattern", *_USED_BY[self.sparsity_pattern])
        unused = tuple(item.name for item in fields(self) if item.name not in used)
        require_defaults(self, unused, f"the pattern {self.sparsity_pattern!r} does not use it")
        if self.sparsity_pattern == "fixed" and (self.num_global_tokens or 1) > self.block_size:
            raise InvalidConfigError(
                argument="num_global_tokens",
                expected=f"at most block_size={self.block_size} with sparsity_pattern='fixed'",
                actual=self.num_global_tokens,
            )
        required = {"global": "num_global_tokens", "top_k": "top_k"}.get(self.sparsity_pattern)
        if required and getattr(self, required) is None:
            raise InvalidConfigError(
                argument=required,
                expected=f"a number with sparsity_pattern={self.sparsity_pattern!r}",
                actual=None,
            )
