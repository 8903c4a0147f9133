"""How nodes' rows lie in memory: on their own, or as columns of one matrix.

Axes of every tensor: B batch or nothing, N nodes, H heads, D channels.
"""

from collections.abc import Sequence

from torch import Tensor

__all__ = ["are_columns", "row_stride"]


def row_stride(x: Tensor) -> int | None:
    """How many numbers lie from one node's row `(H, D)` to the next; None where the kernels cannot read it so."""
    *batch, nodes, heads, width = x.shape
    if x.is_contiguous():
        return heads * width
    *by_batch, stride, by_head, by_number = x.stride()
    is_row = (width == 1 or by_number == 1) and (heads == 1 or by_head == width) and stride >= heads * width
    return stride if is_row and (not batch or batch[0] == 1 or by_batch[0] == nodes * stride) else None


def are_columns(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors lie side by side, in any order, as all the columns of one matrix `(B x N, numbers)`."""
    first, stride = tensors[0], row_stride(tensors[0])
    widths = [x.shape[-2] * x.shape[-1] for x in tensors]
    if stride != sum(widths) or any(x.shape[:-2] != first.shape[:-2] or row_stride(x) != stride for x in tensors):
        return False
    offsets = sorted(zip([x.data_ptr() for x in tensors], widths, strict=True))
    ends = [start + width * first.element_size() for start, width in offsets]
    return all(end == start for end, (start, _) in zip(ends, offsets[1:], strict=False))
