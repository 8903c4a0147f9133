"""Builders: one setter per field, and the same module as made by hand."""

import dataclasses
import inspect

import pytest

from anyattention import (
    AttentionBuilder,
    AttentionConfig,
    GraphAttentionBuilder,
    GraphAttentionConfig,
    GraphTransformerConfig,
    HeterogeneousGraphAttentionConfig,
    SparseAttentionBuilder,
    SparseAttentionConfig,
)
from anyattention.errors import InvalidConfigError
from anyattention.nn import (
    GraphAttention,
    GraphTransformerLayer,
    HeterogeneousGraphAttention,
    MultiHeadAttention,
    ScaledDotProductAttention,
    SparseAttention,
)

# A value for each field, none of them its default.
_BASE = {
    "d_model": 30,
    "num_heads": 5,
    "dropout": 0.3,
    "use_bias": False,
    "scale": 0.7,
    "check_finite": True,
}
_DENSE = {**_BASE, "max_seq_len": 11, "causal": True, "eps": 1e-3, "positions": "learned", "qk_norm": True}
_DENSE |= {"num_kv_heads": 1, "kdim": 30, "vdim": 7, "softcap": 3.0, "rope_theta": 99.0}
_GRAPH = {
    "edge_dim": 7,
    "aggregation": "mean",
    "normalize": False,
    "negative_slope": 0.5,
    "score": "additive",
    "in_features": (2, 3),
    "concat": False,
    "residual": True,
}
# Over nodes of several types: these in place of those of the same name, and no other aggregation than the sum.
_TYPED = {
    "in_features": {"a": 2, "b": 3},
    "relations": [("a", "to", "b"), ("b", "to", "b")],
    "edge_dim": {("b", "to", "b"): 7},
    "softmax_over": "relation",
    "negative_slope": 0.5,
    "score": "additive",
    "concat": False,
    "residual": True,
}
# Of a transformer's layer.
_TRANSFORMER = {
    "attention": "graph + all",
    "score": "additive",
    "edge_dim": 7,
    "max_distance": 3,
    "hidden_features": 11,
    "activation": "relu",
    "feature_dropout": 0.3,
}
# Each field with the settings that it needs beside it.
_SPARSE = {
    "sparsity_pattern": {"sparsity_pattern": "block"},
    "block_size": {"block_size": 7, "sparsity_pattern": "strided"},
    "local_window": {"local_window": 5},
    "num_global_tokens": {"num_global_tokens": 3, "sparsity_pattern": "global"},
    "top_k": {"top_k": 2, "sparsity_pattern": "top_k"},
}


def _setters(builder):
    members = inspect.getmembers(builder, inspect.isfunction)
    return {name for name, _ in members if not name.startswith(("_", "build"))}


def _set(builder, settings):
    for name, value in settings.items():
        assert getattr(builder, name)(value) is builder
    return builder


def _names(config):
    return {field.name for field in dataclasses.fields(config)}


def test_each_dense_field_has_a_setter_and_each_setter_a_field():
    assert _setters(AttentionBuilder) == _names(AttentionConfig) == set(_DENSE)


def test_each_graph_field_has_a_setter_and_each_setter_a_field():
    # use_edge_features follows from edge_dim; the base's sequence settings cannot be used.
    fields = _names(GraphAttentionConfig) | _names(HeterogeneousGraphAttentionConfig) | _names(GraphTransformerConfig)
    fields -= {"base", "use_edge_features"}
    assert _setters(GraphAttentionBuilder) == fields | set(_BASE) == {*_GRAPH, *_TYPED, *_TRANSFORMER, *_BASE}


def test_each_sparse_field_has_a_setter_and_each_setter_a_field():
    fields = _names(SparseAttentionConfig) - {"base"}
    assert _setters(SparseAttentionBuilder) == fields | set(_DENSE) == set(_SPARSE) | set(_DENSE)


@pytest.mark.parametrize("name", _DENSE)
def test_dense_setter_sets_its_field_alone(name):
    # num_heads=5 needs a width that it divides.
    settings = {name: _DENSE[name], **({"d_model": 30} if name == "num_heads" else {})}
    settings |= {"num_heads": 5} if name == "d_model" else {}
    config = _set(AttentionBuilder(), settings).build_config()
    assert getattr(config, name) == _DENSE[name] != getattr(AttentionConfig(), name)
    assert config == AttentionConfig(**settings)


@pytest.mark.parametrize("name", _GRAPH)
def test_graph_setter_sets_its_field_alone(name):
    config = getattr(GraphAttentionBuilder(), name)(_GRAPH[name]).build_config()
    assert getattr(config, name) == _GRAPH[name] != getattr(GraphAttentionConfig(), name)
    assert config == GraphAttentionConfig(**{name: _GRAPH[name]})


@pytest.mark.parametrize("name", _SPARSE)
def test_sparse_setter_sets_its_field(name):
    settings = _SPARSE[name]
    config = _set(SparseAttentionBuilder(), settings).build_config()
    assert getattr(config, name) == settings[name] != getattr(SparseAttentionConfig(), name)
    assert config == SparseAttentionConfig(**settings)


def test_multi_head_equals_the_one_made_by_hand():
    module = _set(AttentionBuilder(), _DENSE).build_multi_head()
    assert type(module) is MultiHeadAttention
    assert module.config == AttentionConfig(**_DENSE) == MultiHeadAttention(**_DENSE).config


def test_scaled_dot_product_equals_the_one_made_by_hand():
    settings = {name: _DENSE[name] for name in ("d_model", "num_heads", "dropout", "scale", "causal", "check_finite")}
    module = _set(AttentionBuilder(), settings).build_scaled_dot_product()
    assert type(module) is ScaledDotProductAttention
    assert module.config == AttentionConfig(**settings) == ScaledDotProductAttention(**settings).config


def test_graph_attention_equals_the_one_made_by_hand():
    module = _set(GraphAttentionBuilder(), {**_BASE, **_GRAPH}).build()
    assert type(module) is GraphAttention
    assert module.config == GraphAttentionConfig(base=AttentionConfig(**_BASE), **_GRAPH)
    assert module.config == GraphAttention(**_BASE, **_GRAPH).config


def test_heterogeneous_attention_equals_the_one_made_by_hand():
    module = _set(GraphAttentionBuilder(), {**_BASE, **_TYPED}).build_heterogeneous()
    assert type(module) is HeterogeneousGraphAttention
    assert module.config == HeterogeneousGraphAttentionConfig(base=AttentionConfig(**_BASE), **_TYPED)
    assert module.config == HeterogeneousGraphAttention(**_BASE, **_TYPED).config


def test_a_transformer_layer_equals_the_one_made_by_hand():
    module = _set(GraphAttentionBuilder(), {**_BASE, **_TRANSFORMER}).build_transformer_layer()
    assert type(module) is GraphTransformerLayer
    assert module.config == GraphTransformerConfig(base=AttentionConfig(**_BASE), **_TRANSFORMER)
    assert module.config == GraphTransformerLayer(**_BASE, **_TRANSFORMER).config
    with pytest.raises(InvalidConfigError, match="concat: expected no such setting of GraphTransformerConfig"):
        GraphAttentionBuilder().concat(False).build_transformer_layer()


def test_settings_of_the_other_kind_of_graph_are_refused():
    typed = GraphAttentionBuilder().relations([("a", "to", "a")])
    with pytest.raises(InvalidConfigError, match="relations: expected no such setting of GraphAttentionConfig"):
        typed.build()
    with pytest.raises(InvalidConfigError, match="in_features: expected a value"):
        typed.build_heterogeneous()
    with pytest.raises(InvalidConfigError, match="aggregation: expected no such setting of Heterogeneous"):
        typed.in_features({"a": 1}).aggregation("max").build_heterogeneous()


def test_sparse_attention_equals_the_one_made_by_hand():
    settings = {"sparsity_pattern": "fixed", "block_size": 7, "num_global_tokens": 2}
    module = _set(SparseAttentionBuilder(), {**_DENSE, **settings}).build_sparse()
    assert type(module) is SparseAttention
    assert module.config == SparseAttentionConfig(base=AttentionConfig(**_DENSE), **settings)
    assert module.config == SparseAttention(**_DENSE, **settings).config


def test_switches_need_no_argument():
    dense = AttentionBuilder().use_bias().causal().qk_norm().check_finite().build_config()
    assert (dense.use_bias, dense.causal, dense.qk_norm, dense.check_finite) == (True,) * 4
    graph = GraphAttentionBuilder().normalize().concat().residual().build_config()
    assert (graph.normalize, graph.concat, graph.residual) == (True,) * 3


def test_the_last_setting_counts():
    assert AttentionBuilder().dropout(0.5).dropout(0.2).build_config().dropout == 0.2


def test_builders_share_nothing():
    first, second = AttentionBuilder().d_model(16), AttentionBuilder()
    assert second.build_config().d_model == 512
    assert first.build_multi_head() is not first.build_multi_head()


def test_settings_are_checked_together_when_building():
    # Neither order of the two setters is an error by itself.
    assert AttentionBuilder().num_heads(5).d_model(30).build_config().d_k == 6
    builder = AttentionBuilder().d_model(30).num_heads(4)
    with pytest.raises(InvalidConfigError, match=r"^num_heads: expected a divisor of d_model=30, got 4"):
        builder.build_multi_head()


@pytest.mark.parametrize("name", ["use_bias", "max_seq_len", "eps", "positions", "qk_norm"])
def test_scaled_dot_product_refuses_what_it_cannot_use(name):
    builder = getattr(AttentionBuilder(), name)(_DENSE[name])
    with pytest.raises(InvalidConfigError, match=f"^{name}: expected its default"):
        builder.build_scaled_dot_product()


def test_dot_score_refuses_a_slope():
    with pytest.raises(InvalidConfigError, match=r"^negative_slope: expected its default 0\.2"):
        GraphAttentionBuilder().score("dot").negative_slope(0.5).build()


def test_sparse_settings_are_checked_when_building():
    builder = SparseAttentionBuilder().local_window(3).sparsity_pattern("block")
    with pytest.raises(InvalidConfigError, match=r"^local_window: expected its default 128 here, got 3"):
        builder.build_sparse()
    with pytest.raises(InvalidConfigError, match=r"^top_k: expected a number with sparsity_pattern='top_k', got None"):
        SparseAttentionBuilder().sparsity_pattern("top_k").build_sparse()
