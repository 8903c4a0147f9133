"""What code may rely on in any attention module, as Protocols that `isinstance` can check."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from anyattention.output import AttentionCache, AttentionGradients, AttentionOutput, SearchResult

__all__ = [
    "Attention",
    "GeometricAttention",
    "GraphAttention",
    "MemoryIndex",
    "SparseAttention",
    "TrainableAttention",
]


@runtime_checkable
class Attention(Protocol):
    """Any attention: it has a width and a name, and is called.

    Example:
        >>> from anyattention.nn import MultiHeadAttention
        >>> isinstance(MultiHeadAttention(8, 2), Attention)
        True
    """

    @property
    def d_model(self) -> int:
        """Width of the output's features (of all heads together)."""
        ...

    @property
    def name(self) -> str:
        """The mechanism's name."""
        ...

    @property
    def supports_masking(self) -> bool:
        """Whether a call takes a mask."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> AttentionOutput:
        """Output and weights (None where not asked for)."""
        ...


@runtime_checkable
class TrainableAttention(Attention, Protocol):
    """Attention with parameters that can be read, written and trained as one vector."""

    def parameter_count(self) -> int:
        """Number of trainable numbers."""
        ...

    def get_parameters(self) -> Tensor:
        """All parameters as one flat vector, in the order of `named_parameters()`."""
        ...

    def set_parameters(self, vector: Tensor) -> None:
        """Write a vector of `get_parameters()` back."""
        ...

    def backward(self, grad_output: Tensor, cache: AttentionCache) -> AttentionGradients:
        """Gradients of the inputs that the cache holds, and of the parameters."""
        ...

    def update_parameters(self, gradients: AttentionGradients | Tensor | None = None, *, learning_rate: float) -> None:
        """One step of plain gradient descent."""
        ...

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients held."""
        ...

    def regularization_loss(self, l2_weight: float) -> Tensor:
        """`l2_weight` times the sum of the squared parameters."""
        ...

    def clone(self) -> "TrainableAttention":
        """An independent copy."""
        ...


@runtime_checkable
class GraphAttention(Attention, Protocol):
    """Attention over the edges of a graph."""

    @property
    def num_graph_heads(self) -> int:
        """Number of heads."""
        ...

    @property
    def supports_edge_features(self) -> bool:
        """Whether this module was built to read edge features."""
        ...

    @property
    def supports_heterogeneous(self) -> bool:
        """Whether nodes and edges may be of several types."""
        ...

    def graph_forward(
        self, node_features: Tensor, edge_index: Tensor, edge_attr: Tensor | None = None
    ) -> AttentionOutput:
        """Output and weights over an edge list (row 0 = source, row 1 = target)."""
        ...

    def sparse_forward(self, node_features: Tensor, adjacency: Any) -> AttentionOutput:
        """Output and weights over an adjacency matrix (rows attend to columns)."""
        ...


@runtime_checkable
class SparseAttention(Attention, Protocol):
    """Attention over part of the (query, key) pairs of a sequence."""

    @property
    def sparsity_ratio(self) -> float:
        """Share of the pairs that are left out."""
        ...

    @property
    def max_attended_positions(self) -> int | None:
        """The most keys that one query attends to; None where the length decides."""
        ...

    @property
    def supports_dynamic_sparsity(self) -> bool:
        """Whether the pairs depend on the scores."""
        ...

    def sparse_forward(self, query: Tensor, key: Tensor, value: Tensor, connectivity: Any) -> AttentionOutput:
        """Output and weights over the pairs that a matrix stores."""
        ...


@runtime_checkable
class GeometricAttention(Attention, Protocol):
    """Attention between points in space."""

    @property
    def geometric_dim(self) -> int:
        """Number of coordinates."""
        ...

    @property
    def is_rotation_equivariant(self) -> bool:
        """Whether rotating the points rotates the output's vectors and nothing else."""
        ...

    @property
    def is_translation_invariant(self) -> bool:
        """Whether moving all points leaves the output as it is."""
        ...

    def geometric_forward(self, query_pos: Tensor, key_pos: Tensor, features: Tensor) -> AttentionOutput:
        """Output per query position from the features at the key positions."""
        ...

    def distance_attention(self, positions: Tensor, features: Tensor, radius: float) -> AttentionOutput:
        """Output per point from the points within the radius, itself included."""
        ...


@runtime_checkable
class MemoryIndex(Protocol):
    """Memories by their keys: what finds those that are most like a query.

    A memory has an id, int64, in order of appending from 0, which is never given again. -1 is an unused slot.

    Example:
        >>> from anyattention.memory import ExactIndex
        >>> isinstance(ExactIndex(64), MemoryIndex)
        True
    """

    @property
    def key_dim(self) -> int:
        """Width of the keys."""
        ...

    def __len__(self) -> int:
        """Number of memories."""
        ...

    def append(self, keys: Tensor) -> Tensor:
        """Take memories of keys `(count, key_dim)`; returns their ids `(count,)`."""
        ...

    def delete(self, ids: Tensor) -> None:
        """Forget memories."""
        ...

    def search(self, queries: Tensor, k: int) -> SearchResult:
        """Ids and scores `(n, k)` of queries `(n, key_dim)`, the best first; -1 and -inf where there are fewer."""
        ...

    def gather(self, ids: Tensor) -> Tensor:
        """The keys `(..., key_dim)` of ids `(...)`; an id of -1 has zeros."""
        ...
