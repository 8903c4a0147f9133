"""The test cases of the operator Attention of ONNX, each as one call of `attend`.

The standard writes the cases down with their inputs and outputs (opsets 23 to 25): grouped heads, softcap, scale,
causal, windows, masks of every kind, caches inside the operator and outside of it, half precision, rows without keys,
NaN in what is hidden, and scores and weights as further outputs. What the operator takes in other forms is translated
here.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anyattention import AttentionResult, Causal, Full, Pattern, Window, attend

# Of the release of the standard that constraints.txt names.
NUM_CASES = 93


@dataclass
class Case:
    """A node, and its tensors by the operator's own names; those of 3 axes have their heads split off."""

    name: str
    attributes: Mapping[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    rank: int

    @property
    def past(self) -> int:
        """How many keys there are in the cache that is an input."""
        return self.inputs["past_key"].shape[1] if "past_key" in self.inputs else 0


_INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
_OUTPUTS = ("Y", "present_key", "present_value", "qk_matmul_output")
_CACHES = ("past_key", "past_value", "present_key", "present_value")


@pytest.fixture(scope="module")
def cases(require: Any) -> list[Case]:
    require("onnx.backend.test.case.node.attention")
    onnx, node = require("onnx"), require("onnx.backend.test.case.node")
    found = [case for case in node._NodeTestCases if case.model.graph.node[0].op_type == "Attention"]
    return [_read(onnx, case) for case in found if len(case.model.graph.node) == 1]


def _read(onnx: Any, case: Any) -> Case:
    (node,) = case.model.graph.node
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    ((inputs, outputs),) = case.data_sets
    given = _named(_INPUTS, node.input, inputs)
    rank = given["Q"].ndim
    heads = {"Q": attributes.get("q_num_heads"), "K": attributes.get("kv_num_heads")}
    heads |= {"V": heads["K"], "Y": heads["Q"]}
    found = _named(_OUTPUTS, node.output, outputs)
    for tensors in (given, found):
        for name, x in tensors.items():
            if name in _CACHES or (name in heads and x.ndim == 4):
                tensors[name] = x.transpose(1, 2)
            elif name in heads:
                tensors[name] = x.unflatten(-1, (heads[name], -1))
    return Case(case.name, attributes, given, found, rank)


def _named(names: tuple[str, ...], present: Any, arrays: Any) -> dict[str, Tensor]:
    """Arrays of an operator's places that are not left empty, by the names of these."""
    left = iter(arrays)
    return {name: _tensor(next(left)) for name, own in zip(names, present, strict=False) if own}


def _tensor(array: Any) -> Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def arguments_of(case: Case) -> dict[str, Any]:
    """The arguments of `attend`."""
    given = case.inputs
    key, value = given["K"], given["V"]
    if case.past:
        key, value = (torch.cat([given[past], new], 1) for past, new in (("past_key", key), ("past_value", value)))
    lengths = given["Q"].shape[1], key.shape[1]
    arguments: dict[str, Any] = {"query": given["Q"], "key": key, "value": value}
    for name in ("scale", "softcap"):
        if case.attributes.get(name):
            arguments[name] = case.attributes[name]
    masks = []
    pattern = _pattern(case, *lengths)
    if pattern is None:
        masks += _masks_by_distance(case, *lengths)
    else:
        arguments["pattern"] = pattern
    if "attn_mask" in given:
        mask = given["attn_mask"]
        hidden = False if mask.dtype == torch.bool else -torch.inf
        mask = torch.nn.functional.pad(mask, (0, lengths[1] - mask.shape[-1]), value=hidden)
        mask = mask[None] if mask.ndim == 3 else mask
        if mask.dtype == torch.bool:
            masks.append(mask)
        else:
            arguments["bias"] = mask
    if masks:
        arguments["mask"] = functools.reduce(torch.logical_and, masks)
    return arguments


def _pattern(case: Case, num_queries: int, num_keys: int) -> Pattern | None:
    """Who attends to whom. Queries stand at their own index, or behind a cache, which a pattern has names for.

    None where they stand elsewhere: each batch entry's at the end of what its cache holds, or before the last keys.
    """
    past = case.past
    if "nonpad_kv_seqlen" in case.inputs or (past and num_keys - num_queries != past):
        return None
    align = "bottom_right" if past else "top_left"
    left, right = _window(case)
    pattern: Pattern = Causal(align) if case.attributes.get("is_causal") else Full()
    if left < 0 and right < 0:
        return pattern
    window = Window(left if left >= 0 else num_keys, right if right >= 0 else num_keys, align)
    return window & pattern if isinstance(pattern, Causal) else window


def _window(case: Case) -> tuple[int, int]:
    """How many keys before the query and behind it are visible; -1 for all."""
    return case.attributes.get("left_window_size", -1), case.attributes.get("right_window_size", -1)


def _masks_by_distance(case: Case, num_queries: int, num_keys: int) -> Iterator[Tensor]:
    """The same of queries that stand anywhere, a mask for each condition."""
    places, before = torch.arange(num_keys), torch.tensor(case.past)
    if "nonpad_kv_seqlen" in case.inputs:
        held = case.inputs["nonpad_kv_seqlen"][:, None, None, None]
        yield places < held
        before = held - num_queries
    distance = places - (torch.arange(num_queries)[:, None] + before)
    left, right = _window(case)
    if case.attributes.get("is_causal"):
        yield distance <= 0
    if left >= 0:
        yield distance >= -left
    if right >= 0:
        yield distance <= right


def outputs_of(case: Case, implementation: str | None) -> dict[str, Tensor]:
    """The operator's outputs."""
    arguments = arguments_of(case) | {"implementation": implementation}
    asks = "qk_matmul_output" in case.outputs
    result = attend(**arguments, return_weights="heads" if asks else False, return_logsumexp=asks)
    found = {"Y": result.output, "present_key": arguments["key"], "present_value": arguments["value"]}
    if asks:
        found["qk_matmul_output"] = _scores_or_weights(case, arguments, result)
    return {name: found[name] for name in case.outputs}


def _scores_or_weights(case: Case, arguments: dict[str, Any], result: AttentionResult) -> Tensor:
    """By its mode: 0 the scaled products, 1 those after the softcap, 2 with mask and bias too, 3 the weights.

    A score is the logarithm of its weight plus logsumexp, in a call without what comes after it.
    """
    mode = case.attributes.get("qk_matmul_output_mode", 0)
    if mode < 2:
        later = ("mask", "bias", "pattern", *(["softcap"] if mode == 0 else []))
        before = {name: x for name, x in arguments.items() if name not in later}
        result = attend(**before, return_weights="heads", return_logsumexp=True)
    weights, logsumexp = result.weights, result.logsumexp
    assert weights is not None
    assert logsumexp is not None
    if weights.ndim == 3:
        weights = _of_all_pairs(weights, arguments)
    return weights if mode == 3 else weights.log() + logsumexp.transpose(1, 2)[..., None]


def _of_all_pairs(weights: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The weights of a sparse pattern's pairs, `(batch, pairs, heads)`, and 0 for the others."""
    lengths = arguments["query"].shape[1], arguments["key"].shape[1]
    graph = arguments["pattern"].to_graph(*lengths)
    dense = weights.new_zeros(*lengths, weights.shape[0], weights.shape[2])
    return dense.index_put((graph.query_index, graph.key_index), weights.transpose(0, 1)).permute(2, 3, 0, 1)


def faults_of(case: Case, implementation: str | None) -> str:
    """How the outputs differ; empty where they do not."""
    found = outputs_of(case, implementation)
    # Half precision is rounded at every step there, and at the end here.
    step = torch.finfo(case.inputs["Q"].dtype).eps
    tolerance = {"rtol": max(1e-5, 4 * step), "atol": max(1e-6, 2 * step)}
    for name, expected in case.outputs.items():
        try:
            torch.testing.assert_close(found[name], expected, **tolerance)
        except AssertionError as fault:
            return f"{name}: {fault}"
    return ""


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_the_cases_of_the_standard(cases: list[Case], implementation: str | None) -> None:
    assert len(cases) == len({case.name for case in cases}) == NUM_CASES
    faults = {case.name: fault for case in cases if (fault := faults_of(case, implementation))}
    assert not faults, "\n".join(f"{name}: {fault}" for name, fault in faults.items())
