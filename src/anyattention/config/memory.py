"""Settings of attention to memories."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from anyattention.config.attention import AttentionConfig, Dropout
from anyattention.errors import InvalidConfigError
from anyattention.settings import Config, documented, require_defaults, require_usable

__all__ = ["IndexDtype", "IndexKind", "MeasureName", "MemoryAttentionConfig", "MemoryBase"]

IndexKind = Literal["exact", "product", "clusters", "faiss", "usearch"]
IndexDtype = Literal["float32", "bfloat16"]
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
        'what finds the memories: "exact" compares the query with each; "product" has trainable keys, the pairs of two '
        "times sqrt(num_memories) half keys of each head, and finds the best of all pairs exactly; "
        '"clusters" compares those of the most promising clusters; "usearch" and "faiss" walk through a graph of near '
        "ones, of extras of their names. These three miss a few",
    ] = "exact"
    num_probes: Annotated[
        int | None,
        'of "clusters": how many of them a search looks into; more of them find more, in more time. None takes as many '
        "as find 95 % of the 32 nearest of some of the keys",
    ] = None
    ef_search: Annotated[
        int | None,
        'of "usearch" and "faiss": how many candidates a search keeps; more of them find more, in more time. None is '
        "four times k, 64 at least",
    ] = None
    index_dtype: Annotated[
        IndexDtype,
        'of "usearch": the dtype of the keys in its graph, which choose alone; weights come from the keys themselves. '
        '"bfloat16" takes half of the memory and less time, and finds a few less',
    ] = "float32"
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
        "of a trainable memory: keys and values (with product keys the values) get sparse gradients, of the memories "
        "that were attended to alone, as torch.optim.SparseAdam takes them",
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
        if self.index not in ("usearch", "faiss"):
            require_defaults(self, ("ef_search",), 'only "usearch" and "faiss" keep candidates')
        if self.index != "clusters":
            require_defaults(self, ("num_probes",), 'only index="clusters" has clusters')
        if self.index != "usearch":
            require_defaults(self, ("index_dtype",), 'only index="usearch" chooses a dtype for its keys')
        if self.index == "product":
            self._require_product()
        if not self.trainable:
            reason = "keys and values are buffers with trainable=False"
            require_defaults(self, ("num_memories", "sparse_grad"), reason)

    def _require_product(self) -> None:
        require_defaults(self, ("measure",), "product keys are compared exactly, by their dot product")
        if not self.trainable:
            raise InvalidConfigError(
                argument="trainable", expected='True with index="product": half keys are parameters', actual=False
            )
        count = self.num_memories
        if count is None or math.isqrt(count) ** 2 != count or count < 1:
            raise InvalidConfigError(
                argument="num_memories", expected='a square with index="product", such as 1024 ** 2', actual=count
            )
        if self.get_key_dim() % 2:
            raise InvalidConfigError(
                argument="key_dim", expected='an even number with index="product"', actual=self.get_key_dim()
            )
        if self.k > count:
            raise InvalidConfigError(argument="k", expected=f"at most num_memories={count}", actual=self.k)

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
