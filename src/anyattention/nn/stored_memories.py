"""The memories of a module: keys, values and ids, which are appended, deleted, searched, moved and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anyattention._checks import Axes, require_device
from anyattention.ambient import lasting
from anyattention.config import MemoryAttentionConfig
from anyattention.errors import InvalidInputError, UnsupportedError
from anyattention.memory.approximate import ApproximateIndex, IndexedRows
from anyattention.memory.exact import SearchedKeys, gathered, ranked, read_queries
from anyattention.memory.growing import GrowingRows
from anyattention.memory.ids import read_keys, require_memories, rows_without
from anyattention.memory.kept import KeptOf
from anyattention.nn.base import AttentionModule
from anyattention.nn.memory_rows import fault_of, index_of, is_same_memory, searched_rows
from anyattention.nn.product_memory import index_of_head
from anyattention.output import SearchResult

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["StoredMemories"]

_ROWS = ("keys", "values", "ids")


class StoredMemories(AttentionModule):
    """What `MemoryAttention` does with its memories but attend to them.

    Attributes:
        config: of the module.
    """

    config: MemoryAttentionConfig
    whole_numbers = ("ids", "next_id")
    keys: Tensor
    values: Tensor
    ids: Tensor
    next_id: Tensor
    half_keys: Tensor
    _growing: dict[str, GrowingRows]
    _searched: KeptOf[Any]

    @property
    def num_memories(self) -> int:
        """How many memories there are."""
        return len(self.values)

    def _reset_rows(self) -> None:
        count = self.config.num_memories or 0
        for name in _ROWS:
            rows = getattr(self, name)
            if len(rows) != count:
                self._replace(name, rows.detach().new_empty(count, *rows.shape[1:]))
        with torch.no_grad():
            self.ids.copy_(torch.arange(count, device=self.ids.device))
            self.next_id.fill_(count)
            if count:
                nn.init.normal_(self.keys, std=self.keys.shape[1] ** -0.5)
                nn.init.normal_(self.values, std=self.values.shape[1] ** -0.5)

    def append(self, keys: Tensor, values: Tensor) -> Tensor:
        """Take more memories.

        With trainable=True the parameters stay the same objects and become longer: an optimizer that keeps numbers for
        each of theirs, as Adam does, must be made anew.

        Args:
            keys: `(count, key_dim)`, finite; kept in the dtype of the module's.
            values: `(count, value_dim)`, finite.

        Returns:
            Their ids `(count,)` int64, in order, which no memory of this module had before.

        Raises:
            DimensionMismatchError, InvalidInputError: another width or number, or a NaN or infinity.
            UnsupportedError: under a compiler, a transform or a mode, or with product keys.

        Cost: in the long run that of copying what is given; "cosine" and "euclidean" prepare it once more.
        """
        self._refuse_product("appended")
        keys = read_keys("keys", keys, self.config.get_key_dim(), self.keys.dtype)
        values = read_keys("values", values, self.config.get_value_dim(), self.values.dtype, "value_dim")
        for name, given in (("keys", keys), ("values", values)):
            require_device(name, given, self.ids.device, "the module")
        Axes("keys", count=len(keys)).bind("values", values, "count value_dim")
        first = int(self.next_id)
        ids = torch.arange(first, first + len(keys), device=self.ids.device)
        searched = self._searched.of(self.keys)
        for name, more in (("keys", keys), ("values", values), ("ids", ids)):
            self._replace(name, self._grown(name).append(more))
        with lasting():  # a module that was made in inference mode has a next_id that is not written to outside
            self.next_id = self.next_id.new_full((), first + len(keys))
        if searched is not None:
            searched.follow(self.keys, self.ids)
            self._searched.keep(searched, self.keys)
        return ids

    def delete(self, ids: Tensor) -> None:
        """Forget memories; their ids are not given again, and the others keep theirs.

        Args:
            ids: `(count,)` int64, or a list.

        Raises:
            InvalidInputError: an id that is not there, or one twice. Nothing is deleted then.
            UnsupportedError: with product keys.

        Cost: that of copying the memories that stay.
        """
        self._refuse_product("deleted")
        kept = rows_without(ids, self.ids)
        searched = self._searched.of(self.keys)
        for name in _ROWS:
            self._replace(name, self._grown(name).keep(kept))
        if searched is not None:
            searched.keep(self.keys, self.ids, kept)
            self._searched.keep(searched, self.keys)

    def search(self, queries: Tensor, k: int | None = None) -> SearchResult:
        """The memories most like some queries, without attending.

        Args:
            queries: `(queries, key_dim)`, in the space of the keys.
            k: how many; None is the module's k.

        Returns:
            SearchResult(ids, scores), both `(queries, k)`, the best first; -1 and -inf where there are fewer.
        """
        queries, k = read_queries(queries, self.config.get_key_dim(), self.config.k if k is None else k)
        require_device("queries", queries, self.values.device, "the module")
        if self.config.index == "product":
            return index_of_head(self.half_keys).search(queries, k)
        return ranked(queries, self.keys, self.ids, self._rows_of(queries, k), self.config.measure)

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The keys `(..., key_dim)` and values `(..., value_dim)` of memories by their ids; -1 has zeros.

        Raises:
            InvalidInputError: an id that is not there.
        """
        if self.config.index == "product":
            slots = torch.arange(len(self.values), device=self.values.device)
            return index_of_head(self.half_keys).gather(ids), gathered(ids, self.values, slots)
        return gathered(ids, self.keys, self.ids), gathered(ids, self.values, self.ids)

    def recall(self, queries: Tensor, k: int | None = None) -> float:
        """Which share of the k most alike memories of some queries the index finds: 1 for an exact one.

        Args:
            queries: `(queries, key_dim)`, in the space of the keys.
            k: how many; None is the module's k.

        Raises:
            InvalidInputError: there are fewer than k memories, or no queries.

        Cost: a search of the index and an exact one.
        """
        found = self.search(queries, k).ids
        if self.config.index == "product":
            return 1.0
        require_memories(self.num_memories, found.shape[1])
        if len(found) == 0:
            raise InvalidInputError(argument="queries", expected="at least one", actual="none")
        exact = SearchedKeys(self.keys.detach(), self.config.measure).search(queries, found.shape[1])
        return float((found.unsqueeze(2) == self.ids[exact].unsqueeze(1)).any(2).double().mean())

    @property
    def index(self) -> ApproximateIndex | None:
        """The approximate index of the keys as they are; None where none is built, as for an exact memory."""
        if self.config.index == "product":
            return None
        searched = self._searched.of(self.keys)
        return searched.index if isinstance(searched, IndexedRows) else None

    def index_content(self) -> bytes | None:
        """The approximate index as a file has it, which `save` keeps; None where none is built."""
        return None if self.index is None else self.index.to_bytes()

    def restore_index(self, content: bytes) -> None:
        """Take an index of these memories that `index_content` gave; readers of other libraries trust what they read.

        Raises:
            InvalidInputError: it is no index of the config's kind, or of other memories.
        """
        if self.config.index in ("exact", "product"):
            expected = f"none: index={self.config.index!r}"
            raise InvalidInputError(argument="index", expected=expected, actual=f"{len(content)} bytes")
        index = index_of(self.config)
        index.restore(content)
        self._searched.keep(IndexedRows(index, self.keys.detach(), self.ids), self.keys)

    def _refuse_product(self, wanted: str) -> None:
        if self.config.index == "product":
            raise UnsupportedError(
                f'index="product": every pair of half keys is a memory, and none can be {wanted}', argument="index"
            )

    def _rows_of(self, queries: Tensor, k: int) -> Tensor:
        """The rows `(queries, k)` that the index finds, the best first, -1 where there are fewer."""
        searched = self._searched.of(self.keys)
        if searched is None:
            searched = searched_rows(self.config, self.keys, self.ids)
            self._searched.keep(searched, self.keys)
        return searched.search(queries, k)

    def _grown(self, name: str) -> GrowingRows:
        """The rows of a name, which may lie at the beginning of larger memory of this module."""
        rows, growing = getattr(self, name).detach(), self._growing.get(name)
        if growing is None or not is_same_memory(growing.rows, rows):
            growing = self._growing[name] = GrowingRows(rows)
        return growing

    def _replace(self, name: str, rows: Tensor) -> None:
        """Put other rows in the place of those of a name: a parameter stays the same object."""
        if name in self._parameters:
            parameter = getattr(self, name)
            parameter.grad = None
            parameter.data = rows
        else:
            setattr(self, name, rows)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """As every module's; ids that had no memory are those of a module as built."""
        if self.config.index == "product":
            return super()._apply(fn, recurse)
        was_hollow = self.ids.is_meta
        super()._apply(fn, recurse)
        if was_hollow and not self.ids.is_meta:
            self.ids.copy_(torch.arange(len(self.ids), device=self.ids.device))
            self.next_id.fill_(len(self.ids))
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As every module's, of another number of memories too."""
        names = (*_ROWS, "next_id")
        tensors = {name: x for name in names if isinstance(x := state_dict.get(prefix + name), Tensor)}
        if len(tensors) == len(names) and self.config.index != "product":
            if (fault := fault_of(**tensors)) is not None:
                error_msgs.append(f"{prefix}ids: {fault}")
                return
            for name in _ROWS:
                rows, count = getattr(self, name), len(tensors[name])
                if len(rows) != count and tensors[name].shape[1:] == rows.shape[1:]:
                    self._replace(name, rows.detach().new_empty(count, *rows.shape[1:]))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
