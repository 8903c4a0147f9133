"""Configs: every field is checked, kept as JSON, and refused where it cannot be used."""

import dataclasses
import inspect
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyattention import (
    AttentionConfig,
    GeometricAttentionConfig,
    GraphAttentionConfig,
    SparseAttentionConfig,
)
from anyattention.errors import InvalidConfigError
from anyattention.nn import (
    DistanceAttention,
    EquivariantAttention,
    GraphAttention,
    MultiHeadAttention,
    ScaledDotProductAttention,
    SparseAttention,
)

_NAN, _INF = math.nan, math.inf
_NO_COUNTS = (0, -1, True, 2.0, "2", None, _NAN, 2**31, 10**30)
_NO_BOOLS = (0, 1, "yes", None, 1.0)
_NO_PROBABILITIES = (-0.1, 1.0, 1.5, _NAN, _INF, True, "0.1", None)
_NO_POSITIVES = (0, 0.0, -1e-6, _NAN, _INF, -_INF, True, "1", 10**400)

# By config, by field: values that are refused.
_REFUSED = {
    AttentionConfig: {
        "d_model": _NO_COUNTS,
        "num_heads": (*_NO_COUNTS, 7),
        "dropout": _NO_PROBABILITIES,
        "use_bias": _NO_BOOLS,
        "scale": _NO_POSITIVES,
        "max_seq_len": _NO_COUNTS,
        "causal": _NO_BOOLS,
        "eps": (*_NO_POSITIVES, None),
        "positions": ("rotary", None, 0, ["none"]),
        "qk_norm": _NO_BOOLS,
        "check_finite": _NO_BOOLS,
        "num_kv_heads": (0, -1, True, "1", 2.5, 3, 16),
        "kdim": (0, -1, True, "1", 2.5),
        "vdim": (0, -1, True, "1", 2.5),
        "softcap": _NO_POSITIVES,
        "rope_theta": (*_NO_POSITIVES, None),
    },
    GraphAttentionConfig: {
        "base": (None, {}, "base", GeometricAttentionConfig()),
        "use_edge_features": (True, 0, "yes"),
        "edge_dim": [count for count in _NO_COUNTS if count is not None],
        "aggregation": ("median", None, ["sum"]),
        "normalize": _NO_BOOLS,
        "negative_slope": (_NAN, _INF, True, "0.2", None, 10**400),
        "score": ("cosine", None, 0),
        "in_features": (0, -1, True, 2.0, "2", (), (3,), (1, 2, 3), (1, 0), (2.0, 3), 2**31),
        "concat": _NO_BOOLS,
        "residual": _NO_BOOLS,
    },
    SparseAttentionConfig: {
        "base": (None, {}),
        "sparsity_pattern": ("dense", None, ["local"]),
        "block_size": (*_NO_COUNTS, 32),
        "local_window": _NO_COUNTS,
        "num_global_tokens": (0, True, "1", 2.5, 1),
        "top_k": (0, True, "1", 2.5, 1),
    },
    GeometricAttentionConfig: {
        "base": (None, {}),
        "geometric_dim": _NO_COUNTS,
        "radius": _NO_POSITIVES,
        "radial_range": _NO_POSITIVES,
        "radial_basis": ("sine", None, 0, ["bessel"], "bessel"),
        "num_radial": (*_NO_COUNTS, 8),
        "vector_channels": (0, -1, True, "8", 2.5, 12),
    },
}

_CASES = [
    pytest.param(kind, name, value, id=f"{kind.__name__}-{name}-{str(value)[:12]}")
    for kind, fields in _REFUSED.items()
    for name, values in fields.items()
    for value in values
]


def _fields(kind):
    return {field.name: field for field in dataclasses.fields(kind)}


def test_every_field_has_values_that_are_refused():
    for kind, refused in _REFUSED.items():
        assert set(refused) == set(_fields(kind))


@pytest.mark.parametrize(("kind", "name", "value"), _CASES)
def test_bad_value_is_refused_by_name_with_reason(kind, name, value):
    # One of the two: a switch that asks for a width says so by the width's name.
    named = "edge_dim" if (name, value) == ("use_edge_features", True) else name
    with pytest.raises(InvalidConfigError, match=rf"^{named}: expected .+, got .+") as caught:
        kind(**{name: value})
    assert caught.value.argument == named


@pytest.mark.parametrize(("kind", "name", "value"), [case for case in _CASES if case.values[1] != "base"])
def test_bad_value_is_refused_in_a_dictionary_too(kind, name, value):
    with pytest.raises(InvalidConfigError, match=r"expected .+, got .+"):
        kind.from_dict({name: value})


def test_error_says_how_to_mend_it():
    with pytest.raises(InvalidConfigError, match=r"got 7. d_model=518 would do") as caught:
        AttentionConfig(512, 7)
    assert AttentionConfig(518, 7).d_k == 74
    assert (caught.value.expected, caught.value.actual) == ("a divisor of d_model=512", 7)


def test_defaults():
    assert AttentionConfig().to_dict() == {
        "d_model": 512,
        "num_heads": 8,
        "dropout": 0.1,
        "use_bias": True,
        "scale": None,
        "max_seq_len": 512,
        "causal": False,
        "eps": 1e-6,
        "positions": "none",
        "qk_norm": False,
        "check_finite": False,
        "num_kv_heads": None,
        "kdim": None,
        "vdim": None,
        "softcap": None,
        "rope_theta": 10000.0,
    }
    assert (GraphAttentionConfig().aggregation, GraphAttentionConfig().negative_slope) == ("sum", 0.2)
    assert (SparseAttentionConfig().block_size, SparseAttentionConfig().local_window) == (64, 128)
    assert (GeometricAttentionConfig().geometric_dim, GeometricAttentionConfig().radius) == (3, None)


def test_head_width_and_scale():
    config = AttentionConfig(d_model=77, num_heads=7)
    assert (config.d_k, config.get_scale()) == (11, 1 / math.sqrt(11))
    assert AttentionConfig(77, 7, scale=0.3).get_scale() == 0.3


def test_scale_of_graph_scores():
    base = AttentionConfig(77, 7)
    assert GraphAttentionConfig(base, score="dot").get_scale() == 1 / math.sqrt(11)
    assert GraphAttentionConfig(base, score="additive").get_scale() == 1.0
    assert GraphAttentionConfig(base, score="dynamic").get_scale() == 1.0
    assert GraphAttentionConfig(AttentionConfig(77, 7, scale=0.3), score="dynamic").get_scale() == 0.3


def test_graph_widths():
    base = AttentionConfig(8, 2)
    one = GraphAttentionConfig(base, in_features=3)
    pair = GraphAttentionConfig(base, in_features=[5, 7])
    neither = GraphAttentionConfig(base)
    assert (one.source_features, one.target_features) == (3, 3)
    assert (pair.source_features, pair.target_features) == (5, 7)
    assert (neither.source_features, neither.target_features) == (8, 8)
    assert pair == GraphAttentionConfig(base, in_features=(5, 7))


def test_edge_features_follow_their_width():
    assert GraphAttentionConfig().use_edge_features is False
    assert GraphAttentionConfig(edge_dim=3).use_edge_features is True
    with pytest.raises(InvalidConfigError, match=r"edge_dim: expected None, got 3. use_edge_features is False"):
        GraphAttentionConfig(use_edge_features=False, edge_dim=3)


@pytest.mark.parametrize("kind", _REFUSED)
def test_configs_are_frozen_and_hashable(kind):
    config = kind()
    for name in _fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError, match=name):
            setattr(config, name, None)
    assert hash(config) == hash(kind())


# A setting that the mechanism cannot use, and why.
_UNUSED = [
    (GraphAttentionConfig, {"max_seq_len": 7}, "a graph has no sequence"),
    (GraphAttentionConfig, {"causal": True}, "a graph has no sequence"),
    (GraphAttentionConfig, {"eps": 1e-3}, "a graph has no sequence"),
    (GraphAttentionConfig, {"positions": "learned"}, "a graph has no sequence"),
    (GraphAttentionConfig, {"qk_norm": True}, "a graph has no sequence"),
    (GraphAttentionConfig, {"num_kv_heads": 1}, "keys and values are the same nodes' features"),
    (GraphAttentionConfig, {"kdim": 3}, "keys and values are the same nodes' features"),
    (GraphAttentionConfig, {"vdim": 3}, "keys and values are the same nodes' features"),
    (GraphAttentionConfig, {"softcap": 3.0}, "only attention over sequences bounds its scores"),
    (GraphAttentionConfig, {"rope_theta": 3.0}, "a graph has no sequence"),
    (GeometricAttentionConfig, {"max_seq_len": 7}, "points have no order"),
    (GeometricAttentionConfig, {"num_kv_heads": 1}, "keys and values are the same nodes' features"),
    (GeometricAttentionConfig, {"kdim": 3}, "keys and values are the same nodes' features"),
    (GeometricAttentionConfig, {"vdim": 3}, "keys and values are the same nodes' features"),
    (GeometricAttentionConfig, {"softcap": 3.0}, "only attention over sequences bounds its scores"),
    (GeometricAttentionConfig, {"rope_theta": 3.0}, "points have no order"),
    (GeometricAttentionConfig, {"causal": True}, "points have no order"),
    (GeometricAttentionConfig, {"positions": "sinusoidal"}, "points have no order"),
    (GeometricAttentionConfig, {"qk_norm": True}, "geometric attention does not use it"),
]


@pytest.mark.parametrize(("kind", "settings", "reason"), _UNUSED)
def test_unused_setting_of_the_base_must_keep_its_default(kind, settings, reason):
    (name,) = settings
    with pytest.raises(InvalidConfigError, match=f"^{name}: expected its default .* here, got .*{reason}"):
        kind(AttentionConfig(8, 2, **settings))


def test_every_setting_of_a_graphs_base_is_used_or_refused():
    refused = {name for kind, settings, _ in _UNUSED for name in settings if kind is GraphAttentionConfig}
    arguments = set(inspect.signature(GraphAttention).parameters)
    assert refused | arguments >= set(_fields(AttentionConfig))
    assert not refused & arguments


@pytest.mark.parametrize(
    "settings",
    [
        {"use_bias": False},
        {"max_seq_len": 7},
        {"eps": 1e-3},
        {"positions": "learned"},
        {"qk_norm": True},
        {"num_kv_heads": 1},
        {"kdim": 3},
        {"vdim": 3},
        {"rope_theta": 3.0},
    ],
)
def test_unused_setting_of_scaled_dot_product_must_keep_its_default(settings):
    (name,) = settings
    with pytest.raises(InvalidConfigError, match=f"^{name}: expected its default .*ScaledDotProductAttention"):
        ScaledDotProductAttention.from_config(AttentionConfig(8, 2, **settings))
    assert name not in inspect.signature(ScaledDotProductAttention).parameters


def test_settings_of_keys_and_positions_fit_each_other():
    with pytest.raises(InvalidConfigError, match=r"^num_kv_heads: expected a divisor of num_heads=4, got 3"):
        AttentionConfig(8, 4, num_kv_heads=3)
    with pytest.raises(InvalidConfigError, match=r"^positions: expected an even d_model / num_heads for 'rope'.*got 3"):
        AttentionConfig(6, 2, positions="rope")
    for positions in ("sinusoidal", "learned"):
        with pytest.raises(InvalidConfigError, match=rf"^kdim: expected d_model=8 with positions='{positions}'.*got 3"):
            AttentionConfig(8, 2, positions=positions, kdim=3)
        assert AttentionConfig(8, 2, positions=positions, kdim=8, vdim=3).kdim == 8
    assert (AttentionConfig(8, 4).key_heads, AttentionConfig(8, 4, num_kv_heads=2).key_heads) == (4, 2)


def test_dot_score_has_no_slope():
    with pytest.raises(InvalidConfigError, match=r"^negative_slope: .*0.2 here, got 0.5. the dot product has no Leaky"):
        GraphAttentionConfig(score="dot", negative_slope=0.5)
    assert GraphAttentionConfig(score="dynamic", negative_slope=0.5).negative_slope == 0.5


_PATTERN_SETTINGS = {
    "local": {"local_window": 7},
    "strided": {"block_size": 7, "local_window": 5},
    "fixed": {"block_size": 7, "num_global_tokens": 2},
    "global": {"local_window": 7, "num_global_tokens": 2},
    "block": {"block_size": 7},
    "top_k": {"top_k": 3},
}
_OTHER_VALUES = {"block_size": 11, "local_window": 11, "num_global_tokens": 1, "top_k": 1}


@pytest.mark.parametrize("pattern", _PATTERN_SETTINGS)
def test_sparse_pattern_takes_its_own_settings_only(pattern):
    settings = _PATTERN_SETTINGS[pattern]
    config = SparseAttentionConfig(sparsity_pattern=pattern, **settings)
    assert {name: getattr(config, name) for name in settings} == settings
    for name, value in _OTHER_VALUES.items():
        if name not in settings:
            with pytest.raises(InvalidConfigError, match=f"^{name}: .*the pattern '{pattern}' does not use it"):
                SparseAttentionConfig(sparsity_pattern=pattern, **settings, **{name: value})


@pytest.mark.parametrize(("pattern", "name"), [("global", "num_global_tokens"), ("top_k", "top_k")])
def test_sparse_pattern_asks_for_what_it_needs(pattern, name):
    with pytest.raises(InvalidConfigError, match=f"^{name}: expected a number with .*'{pattern}', got None"):
        SparseAttentionConfig(sparsity_pattern=pattern)


def test_a_block_holds_its_summary():
    settings = {"sparsity_pattern": "fixed", "block_size": 3}
    assert SparseAttentionConfig(**settings, num_global_tokens=3).num_global_tokens == 3
    with pytest.raises(InvalidConfigError, match=r"^num_global_tokens: expected at most block_size=3 .*'fixed', got 4"):
        SparseAttentionConfig(**settings, num_global_tokens=4)


_counts = st.integers(1, 2**31 - 1)
_positive = st.floats(0, exclude_min=True, allow_infinity=False) | st.integers(1, 1000)
_heads = st.tuples(st.integers(1, 64), st.integers(1, 64)).map(lambda sizes: (sizes[0] * sizes[1], sizes[1]))


def _base(**more):
    probability = st.floats(0, 1, exclude_max=True)
    common = {"dropout": probability, "use_bias": st.booleans(), "scale": st.none() | _positive}
    common |= {"check_finite": st.booleans(), **more}
    return st.builds(lambda sizes, settings: AttentionConfig(*sizes, **settings), _heads, st.fixed_dictionaries(common))


_dense = _base(
    max_seq_len=_counts,
    causal=st.booleans(),
    eps=_positive,
    positions=st.sampled_from(["none", "sinusoidal", "learned", "alibi"]),
    qk_norm=st.booleans(),
    num_kv_heads=st.sampled_from([None, 1]),
    vdim=st.none() | _counts,
    softcap=st.none() | _positive,
    rope_theta=_positive,
)
_graph = st.builds(
    GraphAttentionConfig,
    base=_base(),
    edge_dim=st.none() | _counts,
    aggregation=st.sampled_from(["sum", "mean", "max"]),
    normalize=st.booleans(),
    negative_slope=st.floats(allow_nan=False, allow_infinity=False),
    score=st.sampled_from(["additive", "dynamic"]),
    in_features=st.none() | _counts | st.tuples(_counts, _counts),
    concat=st.booleans(),
    residual=st.booleans(),
)
_sparse = st.sampled_from(sorted(_PATTERN_SETTINGS)).flatmap(
    lambda pattern: st.builds(
        SparseAttentionConfig,
        base=_dense,
        sparsity_pattern=st.just(pattern),
        # A block holds its summary tokens.
        **dict.fromkeys(_PATTERN_SETTINGS[pattern], st.integers(1, 99))
        | ({"block_size": st.integers(99, 2**31 - 1)} if pattern == "fixed" else {}),
    )
)
_geometric = st.builds(
    GeometricAttentionConfig, base=_base(eps=_positive), geometric_dim=_counts, radius=st.none() | _positive
)


@given(st.one_of(_dense, _graph, _sparse, _geometric))
def test_dictionaries_and_json_bring_a_config_back(config):
    kind = type(config)
    values = config.to_dict()
    assert kind.from_dict(values) == config
    assert kind.from_json(config.to_json()) == config
    # JSON's types only: nothing changes on the way.
    assert json.loads(json.dumps(values)) == values
    assert set(values) == set(_fields(kind))


def test_nested_base_in_json():
    text = '{"base": {"d_model": 8, "num_heads": 2}, "in_features": [3, 5], "score": "dot"}'
    config = GraphAttentionConfig.from_json(text)
    assert config == GraphAttentionConfig(AttentionConfig(8, 2), in_features=(3, 5), score="dot")
    assert config.to_dict()["base"]["d_model"] == 8


def test_absent_fields_keep_their_defaults():
    assert SparseAttentionConfig.from_dict({}) == SparseAttentionConfig()
    assert AttentionConfig.from_json("{}") == AttentionConfig()


@pytest.mark.parametrize("kind", _REFUSED)
@pytest.mark.parametrize("name", ["hidden", "d_modl", "", "__class__", "to_dict", 3])
def test_unknown_names_are_refused(kind, name):
    with pytest.raises(InvalidConfigError, match=f"^{kind.__name__}: expected only the fields .*, got {name!r}"):
        kind.from_dict({name: 1})


def test_unknown_name_in_the_base_is_refused():
    with pytest.raises(InvalidConfigError, match=r"^AttentionConfig: expected only the fields .*, got 'hidden'"):
        GraphAttentionConfig.from_json('{"base": {"hidden": 3}}')


@pytest.mark.parametrize("values", [None, [], "{}", 3, [("d_model", 8)]])
def test_only_dictionaries_are_read(values):
    with pytest.raises(InvalidConfigError, match=r"^AttentionConfig: expected a dictionary, got"):
        AttentionConfig.from_dict(values)


@pytest.mark.parametrize("text", ["", "{", "{'d_model': 8}", "[" * 100_000, None, 3])
def test_only_json_is_read(text):
    with pytest.raises(InvalidConfigError, match=r"^AttentionConfig: not valid JSON"):
        AttentionConfig.from_json(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_numbers_must_be_finite(number):
    with pytest.raises(InvalidConfigError, match=r"^eps: expected a finite number above 0, got (nan|-?inf)"):
        AttentionConfig.from_json(f'{{"eps": {number}}}')


def _settings(module):
    parameters = inspect.signature(module).parameters
    return {name: item.default for name, item in parameters.items() if name not in ("device", "dtype")}


# What is given beside the config.
_BESIDE = {"pattern": None, "implementation": None}


def test_multi_head_arguments_are_the_configs_fields():
    fields = {name: field.default for name, field in _fields(AttentionConfig).items()}
    assert _settings(MultiHeadAttention) == {**fields, **_BESIDE}


def test_scaled_dot_product_arguments_are_fields():
    fields = {name: field.default for name, field in _fields(AttentionConfig).items()}
    given = _settings(ScaledDotProductAttention)
    assert given == {name: fields[name] for name in given if name not in _BESIDE} | _BESIDE


def test_graph_arguments_are_the_configs_fields():
    fields = {name: field.default for name, field in _fields(GraphAttentionConfig).items() if name != "base"}
    base = {name: field.default for name, field in _fields(AttentionConfig).items()}
    given = _settings(GraphAttention)
    assert set(fields) <= set(given)
    assert given == {name: fields[name] if name in fields else base[name] for name in given}


def test_sparse_arguments_are_the_configs_fields():
    fields = {name: field.default for name, field in _fields(SparseAttentionConfig).items() if name != "base"}
    base = {name: field.default for name, field in _fields(AttentionConfig).items()}
    assert _settings(SparseAttention) == {**base, **fields, "implementation": None}


@pytest.mark.parametrize("kind", [DistanceAttention, EquivariantAttention])
def test_geometric_arguments_are_the_configs_fields(kind):
    fields = {name: field.default for name, field in _fields(GeometricAttentionConfig).items() if name != "base"}
    base = {name: field.default for name, field in _fields(AttentionConfig).items()} | {"dropout": 0.0}
    given = _settings(kind)
    assert set(fields) - set(given) == ({"vector_channels"} if kind is DistanceAttention else set())
    assert given == {name: fields[name] if name in fields else base[name] for name in given}
    refused = {name for config, settings, _ in _UNUSED for name in settings if config is GeometricAttentionConfig}
    assert refused | set(given) >= set(base)
    assert not refused & set(given)


def test_points_lose_no_pair_unless_asked_and_a_saved_config_keeps_its_dropout():
    assert GeometricAttentionConfig().base.dropout == 0.0
    assert EquivariantAttention.from_config(GeometricAttentionConfig()).config.base.dropout == 0.0
    saved = GeometricAttentionConfig(base=AttentionConfig(8, 2)).to_json()
    assert GeometricAttentionConfig.from_json(saved).base.dropout == 0.1


def test_radial_range_and_vector_channels_have_defaults():
    base = AttentionConfig(12, 3)
    ranges = [GeometricAttentionConfig(base, **each).get_radial_range() for each in (
        {}, {"radius": 2.0}, {"radial_range": 3.0}, {"radius": 2.0, "radial_range": 3.0})]  # fmt: skip
    assert ranges == [None, 2.0, 3.0, 3.0]
    assert GeometricAttentionConfig(base).get_vector_channels() == 3
    assert GeometricAttentionConfig(base, vector_channels=6).get_vector_channels() == 6
    with pytest.raises(InvalidConfigError, match=r"num_radial: .* a radial basis needs a radius or a radial_range"):
        GeometricAttentionConfig(base, num_radial=8)


@pytest.mark.parametrize(
    "module",
    [
        DistanceAttention(6, 3, geometric_dim=2, radius=1.5, radial_basis="bessel", num_radial=4, scale=0.3, eps=1e-3),
        EquivariantAttention(6, 3, radial_range=1.5, vector_channels=6, use_bias=False, dropout=0.3, check_finite=True),
        SparseAttention(6, 3, sparsity_pattern="global", local_window=3, num_global_tokens=2, causal=True, eps=1e-3),
        ScaledDotProductAttention(6, 3, dropout=0.3, scale=0.7, causal=True, check_finite=True),
        MultiHeadAttention(6, 3, use_bias=False, eps=1e-3, positions="sinusoidal", qk_norm=True, max_seq_len=11),
        GraphAttention(6, 3, in_features=(2, 5), edge_dim=7, score="additive", negative_slope=0.5, aggregation="max"),
    ],
    ids=lambda module: module.name,
)
def test_module_gives_its_config_back(module):
    assert type(module).from_config(module.config).config == module.config
