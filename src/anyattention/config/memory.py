"""Settings of attention to memories."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from anyattention.config.attention import AttentionConfig, Dropout
from anyattention.errors import InvalidConfigError
from anyattention.settings import Config, documented, require_defaults, require_usable

__all__ = ["IndexKind", "MeasureName", "MemoryAttentionConfig", "MemoryBase"]

IndexKind = Literal["exact", "faiss", "usearch"]
MeasureName = Literal["dot", "cosine", "euclidean"]

_NO_SEQUENCE = {"unused": "memories have no order"}
_OWN_WIDTHS = {"unused": "all heads share keys of width key_dim and values of width value_dim"}


@dataclass(frozen=True)
class MemoryBase(AttentionConfig):
    """The settings of its base that attention to memories takes: those that are not taken out here."""

    dropout: Dropout = 0.0
    max_seq_len: Any = field(init=False, metadata=_NO_SEQUENCE)
    causal: Any = field(init=False, metadata=_NO_SEQUENCE)
    eps: Any = field(init=False, metadata={"unused": "nothing is normalised by a root mean square"})
    positions: Any = field(init=False, metadata=_NO_SEQUENCE)
    qk_norm: Any = field(init=False, metadata={"unused": 'measure="cosine" normalises queries and keys'})
    num_kv_heads: Any = field(init=False, metadata=_OWN_WIDTHS)
    kdim: Any = field(init=False, metadata=_OWN_WIDTHS)
    vdim: Any = field(init=False, metadata=_OWN_WIDTHS)
    softcap: Any = field(init=False, metadata={"unused": "only attention over sequences bounds its scores"})
    rope_theta: Any = field(init=False, metadata=_NO_SEQUENCE)


@documented
@dataclass(frozen=True)
class MemoryAttentionConfig(Config):
    """Settings of `nn.MemoryAttention`.

    Args: the fields.

    Raises:
        InvalidConfigError: a value is out of range, or is set and cannot be used.

    Example:
        >>> config = MemoryAttentionConfig(AttentionConfig(64, 4), k=8)
        >>> config.get_key_dim(), config.get_value_dim(), config.get_scale()
        (16, 64, 0.25)
    """

    base: Annotated[
        AttentionConfig,
        "the settings of attention; those that `nn.MemoryAttention` does not take must keep their defaults",
    ] = field(default_factory=AttentionConfig)
    key_dim: Annotated[int | None, "width of the keys; None is d_model / num_heads"] = None
    value_dim: Annotated[int | None, "width of the values; None is d_model"] = None
    k: Annotated[int, "how many memories each query and head attends to"] = 32
    measure: Annotated[
        MeasureName,
        'how alike query and key are: "dot" (q . k), "cosine" (both of length 1) or "euclidean" (-|q - k|^2)',
    ] = "dot"
    index: Annotated[
        IndexKind,
        'what finds the memories: "exact" compares the query with each; "usearch" and "faiss" walk through a graph of '
        "near ones, of extras of their names, and miss a few",
    ] = "exact"
    ef_search: Annotated[
        int | None,
        'of "usearch" and "faiss": how many candidates a search keeps; more of them find more, in more time. None is '
        "four times k, 64 at least",
    ] = None
    project: Annotated[
        bool,
        "a projection of the input to the queries and one of the values' sum to d_model; False takes the input as the "
        "query, of one head, and returns the sum. use_bias is inert then",
    ] = True
    trainable: Annotated[bool, "whether keys and values are parameters; False keeps them as buffers"] = False
    num_memories: Annotated[
        int | None, "how many memories to begin with, drawn at random, of a trainable memory; None is none"
    ] = None
    sparse_grad: Annotated[
        bool,
        "of a trainable memory: keys and values get sparse gradients, of the memories that were attended to alone, as "
        "torch.optim.SparseAdam takes them",
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_usable(self.base, MemoryBase)
        if not self.project:
            if self.base.num_heads != 1:
                raise InvalidConfigError(
                    argument="num_heads",
                    expected="1 with project=False, where all heads would be the same",
                    actual=self.base.num_heads,
                )
            if self.get_key_dim() != self.base.d_model:
                raise InvalidConfigError(
                    argument="key_dim",
                    expected=f"d_model={self.base.d_model} with project=False: the input is the query",
                    actual=self.key_dim,
                )
        if self.index == "exact":
            require_defaults(self, ("ef_search",), "an exact index compares all memories")
        if not self.trainable:
            reason = "keys and values are buffers with trainable=False"
            require_defaults(self, ("num_memories", "sparse_grad"), reason)

    def get_key_dim(self) -> int:
        """`key_dim`, or d_model / num_heads."""
        return self.base.d_k if self.key_dim is None else self.key_dim

    def get_value_dim(self) -> int:
        """`value_dim`, or d_model."""
        return self.base.d_model if self.value_dim is None else self.value_dim

    def get_ef_search(self) -> int:
        """`ef_search`, or four times k, 64 at least."""
        return max(64, 4 * self.k) if self.ef_search is None else self.ef_search

    def get_scale(self) -> float:
        """`base.scale`; where that is None, 1 / sqrt(key_dim) for "dot" and 1 for the other measures."""
        if self.base.scale is not None:
            return float(self.base.scale)
        return 1.0 / math.sqrt(self.get_key_dim()) if self.measure == "dot" else 1.0
