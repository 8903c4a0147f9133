"""check_attention must catch a fault planted in each thing that it checks."""

import copy
import inspect
import math

import pytest
import torch

import anyattention.testing.contract as contract
from anyattention import AttentionConfig, AttentionGradients, AttentionOutput, Graph, Window
from anyattention.nn import GraphAttention, MultiHeadAttention, ScaledDotProductAttention, SparseAttention
from anyattention.testing import check_attention


def inputs():
    return torch.randn(2, 5, 12), torch.randn(2, 7, 12)


def broken(base=MultiHeadAttention, **members):
    """A class like `base` with some members replaced; its name stays."""
    return type(base.__name__, (base,), members)


def altered(method, change):
    """A method whose result is changed before it is returned."""

    def call(self, *args, **kwargs):
        return change(self, method(self, *args, **kwargs))

    return call


def forward_then(change):
    """A forward with the same signature, whose result is changed."""

    def forward(self, query, key=None, value=None, mask=None, *, bias=None, return_weights=True):
        result = MultiHeadAttention.forward(self, query, key, value, mask, bias=bias, return_weights=return_weights)
        return change(self, query, result)

    return forward


def spoil_input(self, query, result):
    with torch.no_grad():
        query.mul_(2)
    return result


def random_output(self, query, result):
    return AttentionOutput(torch.randn_like(result.output), result.weights)


def only_if_weights(change):
    """Changes the weights, where there are any."""

    def apply(self, query, result):
        return AttentionOutput(result.output, None if result.weights is None else change(result.weights))

    return apply


def uneven_heads(weights):
    if weights.ndim == 4:
        return weights.clone().mul_(torch.tensor([0.5, 1.5, 1.0])[:, None, None])
    return weights


def negative(weights):
    return weights + (torch.arange(weights.shape[-1]) == 0) * -2.0 + (torch.arange(weights.shape[-1]) == 1) * 2.0


def swapped_parameters(self):
    return torch.cat([x.detach().reshape(-1) for x in reversed(list(self.parameters()))])


def set_all_but_the_last(self, vector):
    last = self.get_parameters()[-1:]
    MultiHeadAttention.set_parameters(self, torch.cat([vector[:-1], last.to(vector)]))


def set_any_length(self, vector):
    MultiHeadAttention.set_parameters(self, vector[: self.parameter_count()])


def forget_an_input(self, gradients):
    kept = {name: x for name, x in gradients.inputs.items() if name != "key"}
    return AttentionGradients(kept, gradients.parameters)


def scale_an_input(self, gradients):
    return AttentionGradients({**gradients.inputs, "key": 1.01 * gradients.inputs["key"]}, gradients.parameters)


def scale_parameters(self, gradients):
    return AttentionGradients(gradients.inputs, gradients.parameters * 1.01)


def hold_nothing(self, gradients):
    self.zero_grad()
    return gradients


def backward_of_any_shape(self, grad_output, cache):
    whole = torch.zeros_like(cache.output)
    whole[..., : grad_output.shape[-1]] = grad_output
    return MultiHeadAttention.backward(self, whole, cache)


def step_up(self, gradients=None, *, learning_rate):
    MultiHeadAttention.update_parameters(self, gradients, learning_rate=learning_rate)
    self.set_parameters(self.get_parameters() + 1e-3)


def step_without_gradients(self, gradients=None, *, learning_rate):
    if gradients is not None or any(x.grad is not None for x in self.parameters()):
        MultiHeadAttention.update_parameters(self, gradients, learning_rate=learning_rate)


def step_along_any_length(self, gradients=None, *, learning_rate):
    if isinstance(gradients, torch.Tensor):
        gradients = gradients[: self.parameter_count()]
    MultiHeadAttention.update_parameters(self, gradients, learning_rate=learning_rate)


def shallow_clone(self):
    return copy.copy(self)


def clone_with_gradients(self):
    twin = MultiHeadAttention.clone(self)
    for one, other in zip(self.parameters(), twin.parameters(), strict=True):
        other.grad = one.grad
    return twin


def clone_of_other_weights(self):
    twin = MultiHeadAttention.clone(self)
    twin.set_parameters(twin.get_parameters() + 0.1)
    return twin


class ForgetfulConfig(AttentionConfig):
    def to_dict(self):
        return {name: value for name, value in super().to_dict().items() if name != "scale"}


class ForgetfulJson(AttentionConfig):
    def to_json(self):
        return AttentionConfig(self.d_model, self.num_heads).to_json()


def with_config(kind):
    def init(self, *args, **kwargs):
        MultiHeadAttention.__init__(self, *args, **kwargs)
        self.config = kind(12, 3, scale=0.7)

    return init


def rebuilt_with(**changes):
    def from_config(cls, config):
        module = cls(**{**config.to_dict(), **changes})
        return module

    return classmethod(from_config)


def rebuilt_without_bias(cls, config):
    module = cls(**{**config.to_dict(), "use_bias": False})
    module.config = config
    return module


Base = MultiHeadAttention
FAULTS = {
    "interfaces: Attention also needs name": {"name": property(lambda self: self.missing)},
    "interfaces: name is ''": {"name": ""},
    "interfaces: d_model is 12.0": {"d_model": 12.0},
    "interfaces: supports_masking is 1": {"supports_masking": 1},
    "interfaces: GraphAttention also needs num_graph_heads, sparse_forward": {"graph_forward": lambda self: None},
    "interfaces: GeometricAttention also needs distance_attention": {"geometric_forward": lambda self: None},
    "interfaces: SparseAttention also needs max_attended_positions": {"sparsity_ratio": 0.5},
    "output: a call returns tuple, not AttentionOutput": {"forward": forward_then(lambda self, q, r: tuple(r))},
    "output: the input query .* differs from after the call": {"forward": forward_then(spoil_input)},
    r"output: the output's shape is \(2, 5, 11\), not \(2, 5, 12\)": {
        "forward": forward_then(lambda self, q, r: AttentionOutput(r.output[..., 1:], r.weights))
    },
    "output: the output is torch.float64, the query torch.float32": {
        "forward": forward_then(lambda self, q, r: AttentionOutput(r.output.double(), r.weights))
    },
    "output: the output is not finite": {
        "forward": forward_then(lambda self, q, r: AttentionOutput(r.output * math.inf, r.weights))
    },
    "output: the output .* differs from in a second call": {"forward": forward_then(random_output)},
    "weights: return_weights=False returns weights": {
        "forward": forward_then(lambda self, q, r: AttentionOutput(r.output, q if r.weights is None else r.weights))
    },
    "weights: return_weights=True returns None": {
        "forward": forward_then(lambda self, q, r: AttentionOutput(r.output, None))
    },
    "weights: the output with return_weights=True is wrong": {
        "forward": forward_then(
            lambda self, q, r: AttentionOutput(r.output if r.weights is None else r.output * 1.1, r.weights)
        )
    },
    "weights: the mean weights is wrong": {"forward": forward_then(only_if_weights(uneven_heads))},
    r"weights: a weight is outside \[0, 1\]": {"forward": forward_then(only_if_weights(negative))},
    "weights: the sum of a row's weights is wrong": {"forward": forward_then(only_if_weights(lambda w: w * 0.9))},
    "parameters: parameter_count.. is 625": {
        "parameter_count": altered(Base.parameter_count, lambda self, count: count + 1)
    },
    r"parameters: get_parameters\(\) has the shape \(623,\), not \(624,\)": {
        "get_parameters": altered(Base.get_parameters, lambda self, vector: vector[1:])
    },
    "parameters: get_parameters.* differs from flattened parameters": {"get_parameters": swapped_parameters},
    "parameters: get_parameters.* differs from what was set": {"set_parameters": set_all_but_the_last},
    r"parameters: set_parameters\(get_parameters\(\)\): query_projection.weight .* differs from afterwards": {
        "get_parameters": altered(Base.get_parameters, lambda self, vector: vector.bfloat16())
    },
    "parameters: set_parameters' argument .* differs from after the call": {
        "set_parameters": lambda self, vector: (Base.set_parameters(self, vector), vector.add_(1))[0]
    },
    r"parameters: set_parameters\(a vector too long\) raises no DimensionMismatchError": {
        "set_parameters": set_any_length
    },
    "backward: cached_forward's output is wrong": {
        "cached_forward": altered(Base.cached_forward, lambda self, r: (AttentionOutput(r[0].output * 1.1), r[1]))
    },
    "backward: backward has gradients of .'query'., not of .'key', 'query'.": {
        "backward": altered(Base.backward, forget_an_input)
    },
    "backward: backward's gradient of key is wrong": {"backward": altered(Base.backward, scale_an_input)},
    "backward: backward's gradient of the parameters is wrong": {"backward": altered(Base.backward, scale_parameters)},
    "backward: the gradient held after backward is wrong": {"backward": altered(Base.backward, hold_nothing)},
    r"backward: backward\(a gradient of another shape\) raises no": {"backward": backward_of_any_shape},
    "backward: raised RuntimeError: not today": {
        "backward": altered(Base.backward, lambda self, _: (_ for _ in ()).throw(RuntimeError("not today")))
    },
    "update_parameters: a step of 0.1 along the gradients held is wrong": {"update_parameters": step_up},
    "update_parameters: update_parameters without gradients raises no TrainingError": {
        "update_parameters": step_without_gradients
    },
    r"update_parameters: update_parameters\(a vector too long\) raises no": {
        "update_parameters": step_along_any_length
    },
    "zero_grad: query_projection.weight still holds": {"zero_grad": lambda self, set_to_none=True: None},
    "regularization_loss: 0.3 times the sum of squares is wrong": {
        "regularization_loss": altered(Base.regularization_loss, lambda self, loss: loss / 2)
    },
    "regularization_loss: its shape": {
        "regularization_loss": altered(Base.regularization_loss, lambda self, loss: loss[None])
    },
    "regularization_loss: its gradient is wrong": {
        "regularization_loss": altered(Base.regularization_loss, lambda self, loss: loss.detach() + 0 * loss)
    },
    "clone: it is a dict": {"clone": lambda self: {}},
    "clone: its output .* differs from the module's": {"clone": clone_of_other_weights},
    "clone: it holds the gradient of query_projection.weight": {"clone": clone_with_gradients},
    "clone: the module lost the gradient": {"clone": altered(Base.clone, lambda self, twin: self.zero_grad() or twin)},
    "config: from_json.to_json.*scale=None": {"__init__": with_config(ForgetfulJson)},
    "config: from_dict.to_dict.*|config: from_json.*scale=None": {"__init__": with_config(ForgetfulConfig)},
    "config: from_config.config..config is .*scale=2": {"from_config": rebuilt_with(scale=2.0)},
    "config: from_config.config. has the parameters": {"from_config": classmethod(rebuilt_without_bias)},
}


@pytest.mark.parametrize("match", FAULTS)
def test_a_planted_fault_is_named(match):
    module = broken(**FAULTS[match])(12, 3)
    with pytest.raises(AssertionError, match=f"^MultiHeadAttention, {match}"):
        check_attention(module, *inputs())


def test_the_same_module_without_a_fault_passes():
    check_attention(broken()(12, 3), *inputs())


def test_inputs_may_come_by_keyword():
    names = inspect.signature(ScaledDotProductAttention.forward).parameters
    check_attention(broken()(12, 3), **dict(zip(list(names)[1:], inputs(), strict=False)))


def test_a_clone_that_shares_is_named():
    module = broken(ScaledDotProductAttention, clone=shallow_clone)(12, 3)
    check_attention(module, *inputs())  # nothing to share
    with pytest.raises(AssertionError, match=r"clone: it holds the gradient|clone: the module's parameters"):
        check_attention(broken(clone=shallow_clone)(12, 3), *inputs())
    sharing = broken(clone=altered(MultiHeadAttention.clone, share_weights))
    with pytest.raises(AssertionError, match=r"clone: the module's parameters .* after its clone changed"):
        check_attention(sharing(12, 3), *inputs())


def share_weights(self, twin):
    for one, other in zip(self.parameters(), twin.parameters(), strict=True):
        other.data = one.data
    return twin


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda loaded: MultiHeadAttention(12, 4), r"load\(save\(\)\).config is .*num_heads=4"),
        (lambda loaded: ScaledDotProductAttention(12, 3), r"load\(save\(\)\) is a ScaledDotProductAttention"),
        (lambda loaded: loaded.double(), r"load\(save\(\)\): query_projection.weight \(torch.float32"),
        (lambda loaded: MultiHeadAttention(12, 3), r"load\(save\(\)\): query_projection.weight .* differs"),
        (lambda loaded: loaded.train(), r"the output of load\(save\(\)\) .* differs from the module's"),
    ],
)
def test_a_fault_of_save_and_load_is_named(monkeypatch, spoil, match):
    original = contract.load
    monkeypatch.setattr(contract, "load", lambda folder: spoil(original(folder)))
    with pytest.raises(AssertionError, match=f"^MultiHeadAttention, saving: {match}"):
        check_attention(MultiHeadAttention(12, 3), *inputs())


def test_a_fault_over_a_graph_is_named():
    def forward(self, x, graph, edge_attr=None, *, mask=None, return_weights=False):
        result = GraphAttention.forward(self, x, graph, edge_attr, mask=mask, return_weights=return_weights)
        return AttentionOutput(result.output, None if result.weights is None else result.weights * 0.9)

    graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 1, 0]]), num_nodes=4)
    module = broken(GraphAttention, forward=forward)(12, 3)
    with pytest.raises(AssertionError, match="GraphAttention, weights: the sum of a row's weights is wrong"):
        check_attention(module, torch.randn(4, 12), graph)
    check_attention(broken(GraphAttention)(12, 3), torch.randn(4, 12), graph)


@pytest.mark.parametrize("causal", [False, True])
def test_a_fault_over_a_pattern_is_named(causal):
    def forward(self, query, key=None, value=None, mask=None, *, bias=None, return_weights=False):
        kind = type(self).__base__
        result = kind.forward(self, query, key, value, mask, bias=bias, return_weights=return_weights)
        # Each pair has the weight of the one before it.
        return AttentionOutput(result.output, None if result.weights is None else result.weights.roll(1, 1))

    x = torch.randn(2, 5, 12)
    for kind, settings in ((SparseAttention, {"local_window": 1}), (MultiHeadAttention, {"pattern": Window(2, 1)})):
        with pytest.raises(AssertionError, match=f"{kind.__name__}, weights: the sum of a row's weights is wrong"):
            check_attention(broken(kind, forward=forward)(12, 3, causal=causal, **settings), x)
        check_attention(kind(12, 3, causal=causal, **settings), x)


def test_the_module_stays_as_it_was():
    module = MultiHeadAttention(12, 3).train()
    before = module.get_parameters()
    x = torch.randn(2, 5, 12, requires_grad=True)
    check_attention(module, x)
    assert module.training
    assert torch.equal(module.get_parameters(), before)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert x.grad is None
