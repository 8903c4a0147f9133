"""Why compiled kernels cannot run a call; None where they can. What each kernel lacks besides, its own file says."""

from __future__ import annotations

from torch import Tensor

from anyattention import native
from anyattention.ambient import is_transformed
from anyattention.ops.arguments import Arguments
from anyattention.scores import SCORES

__all__ = ["refusal_of_device", "refusal_of_rows", "refusal_of_tiles"]


def refusal_of_device(x: Tensor, name: str) -> str | None:
    """Of tensors on this one's device."""
    if not x.is_cpu:
        return f"the kernels run on the CPU, and the {name} on {x.device}"
    if not native.available():
        return "no kernels are compiled (see `anyattention info`)"
    return None


def refusal_of_rows(call: Arguments) -> str | None:
    """Of kernels that go over rows of nodes or positions."""
    unable = refusal_of_device(call.query, "query is")
    if unable is not None:
        return unable
    score = type(call.score)
    if SCORES.get(score.__name__) is not score:
        return f"the kernels have no score {score.__name__}"
    if 0 in call.query.shape[-2:] or call.value.shape[-1] == 0:
        return "a size is 0"
    edges = () if call.edges is None else (call.edges.features, call.edges.key_weight, call.edges.value_weight)
    if is_transformed(call.query, call.key, call.value, call.bias_numbers, call.score.operands[0], *edges):
        return "the kernels have no forward derivatives and no rules for the transforms of torch.func"
    return None


def refusal_of_tiles(call: Arguments) -> str | None:
    """Of kernels that go over tiles of pairs."""
    unable = refusal_of_rows(call)
    if unable is not None:
        return unable
    if not call.score.is_product:
        return f"tiles are products, and the score is {type(call.score).__name__}"
    return None
