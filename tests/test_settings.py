"""A setting is written once: signatures, help, `from_config` and type checkers know it from the config's field."""

import ast
import copy
import inspect
import json
import pickle
import pydoc
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

import pytest
import torch

from anyattention import (
    AttentionBuilder,
    AttentionConfig,
    GeometricAttentionConfig,
    GraphAttentionBuilder,
    GraphAttentionConfig,
    GraphTransformerConfig,
    HeterogeneousGraphAttentionConfig,
    Pattern,
    SparseAttentionBuilder,
    SparseAttentionConfig,
    TopK,
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
from anyattention.nn.arguments import ParameterArguments, PatternArgument, arguments_of, takes
from anyattention.settings import Config, Within, documented

# Each setting's type and default, written out by hand.
_SETTINGS = {
    "d_model": (int, 512),
    "num_heads": (int, 8),
    "dropout": (float, 0.1),
    "use_bias": (bool, True),
    "scale": (float | None, None),
    "max_seq_len": (int, 512),
    "causal": (bool, False),
    "eps": (float, 1e-6),
    "positions": (Literal["none", "sinusoidal", "learned", "rope", "alibi"], "none"),
    "qk_norm": (bool, False),
    "check_finite": (bool, False),
    "num_kv_heads": (int | None, None),
    "kdim": (int | None, None),
    "vdim": (int | None, None),
    "softcap": (float | None, None),
    "rope_theta": (float, 10000.0),
    "use_edge_features": (bool | None, None),
    "edge_dim": (int | None, None),
    "aggregation": (Literal["sum", "mean", "max"], "sum"),
    "normalize": (bool, True),
    "negative_slope": (float, 0.2),
    "score": (Literal["additive", "dynamic", "dot"], "dynamic"),
    "in_features": (int | tuple[int, int] | None, None),
    "concat": (bool, True),
    "residual": (bool, False),
    "sparsity_pattern": (Literal["local", "strided", "fixed", "global", "block", "top_k"], "local"),
    "block_size": (int, 64),
    "local_window": (int, 128),
    "num_global_tokens": (int | None, None),
    "top_k": (int | None, None),
    "geometric_dim": (int, 3),
    "radius": (float | None, None),
    "radial_range": (float | None, None),
    "radial_basis": (Literal["gaussian", "bessel"], "gaussian"),
    "num_radial": (int, 16),
    "vector_channels": (int | None, None),
}
_BESIDE = {
    "pattern": (Pattern | TopK | None, None),
    "implementation": (str | None, None),
    "device": (torch.device | str | None, None),
    "dtype": (torch.dtype | None, None),
}

_NAMES = list(_SETTINGS)
_DENSE = _NAMES[: _NAMES.index("use_edge_features")]
_GRAPH = _NAMES[len(_DENSE) : _NAMES.index("sparsity_pattern")]
_SPARSE = _NAMES[_NAMES.index("sparsity_pattern") : _NAMES.index("geometric_dim")]
_POINTS = _NAMES[_NAMES.index("geometric_dim") :]
_SHARED = ["d_model", "num_heads", "dropout", "use_bias", "scale"]
_KIND = ["device", "dtype"]

_ARGUMENTS = {
    ScaledDotProductAttention: [
        *("d_model", "num_heads", "dropout", "scale", "causal", "check_finite", "softcap", "pattern", "implementation")
    ],
    MultiHeadAttention: [*_DENSE, "pattern", "implementation", *_KIND],
    SparseAttention: [*_DENSE, *_SPARSE, "implementation", *_KIND],
    GraphAttention: [*_SHARED, "check_finite", *_GRAPH, *_KIND],
    DistanceAttention: [*_SHARED, "eps", "check_finite", *_POINTS[:-1], *_KIND],
    EquivariantAttention: [*_SHARED, "eps", "check_finite", *_POINTS, *_KIND],
}
_FIELDS = {
    AttentionConfig: _DENSE,
    GraphAttentionConfig: ["base", *_GRAPH],
    SparseAttentionConfig: ["base", *_SPARSE],
    GeometricAttentionConfig: ["base", *_POINTS],
}


_OWN_DEFAULTS = {DistanceAttention: {"dropout": (float, 0.0)}, EquivariantAttention: {"dropout": (float, 0.0)}}


# What a builder takes beside these, since it builds for nodes of several types too.
_RELATION = tuple[str, str, str]
_BUILT = {
    "edge_dim": (int | Mapping[_RELATION, int], None),
    "in_features": (int | tuple[int, int] | Mapping[str, int], None),
    "relations": (Sequence[_RELATION], None),
    "softmax_over": (Literal["node", "relation"], None),
    "attention": (Literal["graph", "all", "expander", "graph + all"], "graph"),
    "max_distance": (int | None, None),
    "hidden_features": (int | None, None),
    "activation": (Literal["gelu", "relu"], "gelu"),
    "feature_dropout": (float, 0.1),
}


def _arguments_in_help(kind):
    """The names under "Args:", each with what it means."""
    section = re.search(r"^Args:\n((?: .*\n)+)", inspect.getdoc(kind), re.MULTILINE)
    return dict(re.findall(r"^    (\w+): (.+(?:\n        .+)*)", section[1], re.MULTILINE))


@pytest.mark.parametrize("module", _ARGUMENTS)
def test_signature_shows_each_argument_with_type_and_default(module):
    shown = inspect.signature(module)
    assert list(shown.parameters) == _ARGUMENTS[module]
    for name, parameter in shown.parameters.items():
        expected = {**_SETTINGS, **_BESIDE, **_OWN_DEFAULTS.get(module, {})}[name]
        assert (parameter.annotation, parameter.default) == expected
        assert get_type_hints(module.__init__)[name] == parameter.annotation
        is_size = name in ("d_model", "num_heads")
        assert parameter.kind == (parameter.POSITIONAL_OR_KEYWORD if is_size else parameter.KEYWORD_ONLY)


@pytest.mark.parametrize("config", _FIELDS)
def test_config_signature_shows_each_field_with_type_and_default(config):
    shown = inspect.signature(config).parameters
    assert list(shown) == _FIELDS[config]
    for name, parameter in shown.items():
        assert parameter.kind == parameter.POSITIONAL_OR_KEYWORD
        if name == "base":
            assert parameter.annotation is AttentionConfig
        else:
            assert (parameter.annotation, parameter.default) == _SETTINGS[name]


@pytest.mark.parametrize("kind", [*_ARGUMENTS, *_FIELDS], ids=lambda kind: kind.__name__)
def test_help_explains_each_argument_and_no_other(kind):
    names = {**_ARGUMENTS, **_FIELDS}[kind]
    explained = _arguments_in_help(kind)
    assert list(explained) == names
    assert all(len(text) > 10 and text.endswith(".") for text in explained.values())
    page = pydoc.plain(pydoc.render_doc(kind))
    for name in names:
        assert re.search(rf"\b{name}: .+", page)
    assert f"{kind.__name__}({names[0]}: " in page
    assert "Annotated" not in page.split("Method resolution order")[0]


@pytest.mark.parametrize("module", _ARGUMENTS)
def test_module_and_config_explain_a_setting_in_the_same_words(module):
    fields = {name: text for config in _FIELDS for name, text in _arguments_in_help(config).items()}
    for name, text in _arguments_in_help(module).items():
        if name not in _BESIDE:
            assert text.split() == fields[name].split()


@pytest.mark.parametrize("builder", [AttentionBuilder, GraphAttentionBuilder, SparseAttentionBuilder])
def test_each_method_of_a_builder_shows_type_and_default_and_is_explained(builder):
    configs = [GraphTransformerConfig, HeterogeneousGraphAttentionConfig, *_FIELDS]
    fields = {name: text for config in configs for name, text in _arguments_in_help(config).items()}
    methods = inspect.getmembers(builder, inspect.isfunction)
    setters = {name: method for name, method in methods if not name.startswith(("_", "build"))}
    assert set(setters) >= {"d_model", "num_heads", "dropout", "use_bias", "scale", "check_finite"}
    for name, method in setters.items():
        kind, _ = _BUILT.get(name) or _SETTINGS[name]
        _, argument = inspect.signature(method).parameters.values()
        # A width that is None is one that is not set.
        assert argument.annotation == kind or argument.annotation | None == kind
        assert argument.default is (True if kind is bool else inspect.Parameter.empty)
        assert method.__name__ == name
        assert inspect.getdoc(method).lower().split() == fields[name].lower().split()


@pytest.mark.parametrize("module", _ARGUMENTS)
def test_calls_that_do_not_fit_the_signature_are_refused(module):
    name = module.__name__
    with pytest.raises(TypeError, match=rf"{name}\.__init__\(\) got an unexpected keyword argument 'd_modle'"):
        module(d_modle=8)
    with pytest.raises(TypeError, match=rf"{name}\.__init__\(\) too many positional arguments"):
        module(8, 2, 0.1)
    with pytest.raises(TypeError, match=rf"{name}\.__init__\(\) multiple values for argument 'd_model'"):
        module(8, d_model=8)
    for unused in {*_SETTINGS, *_BESIDE} - {*_ARGUMENTS[module]}:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{unused}'"):
            module(8, 2, **{unused: None})


def test_calls_of_a_builder_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="missing a required argument: 'probability'"):
        AttentionBuilder().dropout()
    with pytest.raises(TypeError, match="unexpected keyword argument 'rate'"):
        AttentionBuilder().dropout(0.1, rate=0.1)
    assert AttentionBuilder().dropout(probability=0.3).build_config().dropout == 0.3


class _Wider(MultiHeadAttention):
    """With another constructor.

    Args: the fields of nothing.
    """

    def __init__(self, width: int, **settings: Any) -> None:
        super().__init__(2 * width, 2, qk_norm=True, **settings)
        self.width = width


class _Named(GraphAttention):
    """With the constructor that it inherits."""


def test_subclasses_choose_their_own_constructor():
    assert _Wider(4, dropout=0.0).config == AttentionConfig(8, 2, dropout=0.0, qk_norm=True)
    assert "Args: the fields of nothing." in _Wider.__doc__
    assert list(inspect.signature(_Wider).parameters) == ["width", "settings"]


def test_subclasses_inherit_constructor_and_from_config():
    module = _Named.from_config(_Named(8, 2, in_features=3, score="dot").config, dtype=torch.float64)
    assert type(module) is _Named
    assert module.config == GraphAttentionConfig(AttentionConfig(8, 2), in_features=3, score="dot")
    assert next(module.parameters()).dtype == torch.float64
    assert inspect.signature(_Named) == inspect.signature(GraphAttention)
    assert _Named.__doc__ == "With the constructor that it inherits."


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("build", [lambda: _Wider(4), lambda: MultiHeadAttention(8, 2, dropout=0.3)])
def test_copies_keep_settings_and_results(build, copied):
    module = build().eval()
    twin, x = copied(module), torch.randn(2, 3, 8)
    assert (type(twin), twin.config) == (type(module), module.config)
    assert torch.equal(twin(x).output, module(x).output)


def test_an_exported_module_computes_the_same():
    module, x = MultiHeadAttention(8, 2, qk_norm=True, causal=True).eval(), torch.randn(2, 3, 8)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x)[0], module(x).output)


@documented
@dataclass(frozen=True)
class _WarmConfig(AttentionConfig):
    """Settings of `_Warm`.

    Args: the fields.
    """

    warmth: Annotated[float, Within(above=0.0), "divides the scores; " + "a text of many words " * 5 + "ends"] = 1.5


@dataclass(frozen=True)
class _WarmArguments(ParameterArguments, PatternArgument, _WarmConfig):
    """Its arguments."""


class _Warm(MultiHeadAttention):
    """Warm attention.

    Args: the fields of `_WarmArguments`.
    """

    config: _WarmConfig

    @takes(_WarmArguments)
    def __init__(self, config: _WarmConfig, pattern: Any, device: Any, dtype: Any) -> None:
        super().__init__(config.d_model, config.num_heads, pattern=pattern, device=device, dtype=dtype)
        self.config = config

    @classmethod
    def from_config(cls, config: _WarmConfig) -> "_Warm":
        return cls(**arguments_of(config, _WarmArguments))


def test_a_new_setting_is_one_field():
    assert _Warm(8, 2, warmth=3.0).config.warmth == 3.0
    assert inspect.signature(_Warm).parameters["warmth"].default == 1.5
    assert _Warm.from_config(_WarmConfig(8, 2, warmth=2.5)).config == _WarmConfig(8, 2, warmth=2.5)
    with pytest.raises(InvalidConfigError, match=r"warmth: expected a finite number above 0, got 0\.0"):
        _Warm(8, 2, warmth=0.0)
    with pytest.raises(InvalidConfigError, match="config: expected _WarmConfig, got AttentionConfig"):
        _Warm.from_config(AttentionConfig(8, 2))
    text = _arguments_in_help(_Warm)["warmth"]
    assert text.split() == ("divides the scores; " + "a text of many words " * 5 + "ends.").split()
    assert len(text.splitlines()) == 2
    assert max(map(len, inspect.getdoc(_Warm).splitlines())) <= 120


def test_a_config_with_more_settings_is_refused_by_a_module_that_does_not_take_them():
    with pytest.raises(TypeError, match="unexpected keyword argument 'warmth'"):
        MultiHeadAttention.from_config(_WarmConfig(8, 2))


def test_a_field_of_plain_type_is_left_to_its_config():
    @dataclass(frozen=True)
    class Plain(Config):
        name: str = "x"
        count: int = 0

    assert Plain(count=-1).to_dict() == {"name": "x", "count": -1}


# What is wrong with a line stands behind it.
_CALLS = """
import anyattention as aa
import torch

class Mine(aa.nn.MultiHeadAttention):
    def __init__(self, width: int) -> None:
        super().__init__(width, 2, causal=True, pattern=aa.Window(1, 1))

aa.nn.MultiHeadAttention(8, 2, dropout=0.1, positions="learned", device="cpu", dtype=torch.float64)
aa.nn.MultiHeadAttention(d_modle=3)  # No parameter named "d_modle"
aa.nn.MultiHeadAttention("8")  # cannot be assigned to parameter "d_model" of type "int"
aa.nn.MultiHeadAttention(8, 2, pattern="causal")  # cannot be assigned to parameter "pattern"
aa.nn.ScaledDotProductAttention(8, 2, qk_norm=True)  # No parameter named "qk_norm"
aa.nn.ScaledDotProductAttention(8, 2, device="cpu")  # No parameter named "device"
aa.nn.GraphAttention(8, 2, score="dot", in_features=(2, 3))
aa.nn.GraphAttention(8, 2, score="nope")  # cannot be assigned to parameter "score"
aa.nn.GraphAttention(8, 2, causal=True)  # No parameter named "causal"
aa.nn.GraphAttention(8, 2, base=aa.AttentionConfig())  # No parameter named "base"
aa.nn.SparseAttention(8, 2, sparsity_pattern="block", block_size=4, causal=True)
aa.nn.SparseAttention(8, 2, top_k="3")  # cannot be assigned to parameter "top_k"
aa.nn.DistanceAttention(8, 2, radial_basis="bessel", radius=1.0)
aa.nn.DistanceAttention(8, 2, vector_channels=4)  # No parameter named "vector_channels"
aa.nn.EquivariantAttention(8, 2, vector_channels=4)
aa.nn.EquivariantAttention(8, 2, radial_basis="sine")  # cannot be assigned to parameter "radial_basis"
Mine(8)
Mine(8, 2)  # Expected 1 positional argument
aa.AttentionConfig(8, 2, 0.1, True)
aa.AttentionConfig(8, 2, positions="rotary")  # cannot be assigned to parameter "positions"
aa.GraphAttentionConfig(aa.AttentionConfig(8, 2), edge_dim=3)
aa.GraphAttentionConfig(aa.AttentionConfig(8, 2), edge_dims=3)  # No parameter named "edge_dims"
aa.AttentionBuilder().d_model(8).causal().dropout(probability=0.1).build_multi_head()
aa.AttentionBuilder().dropout(rate=0.1)  # No parameter named "rate"
aa.AttentionBuilder().positions("rotary")  # cannot be assigned to parameter "kind"
aa.GraphAttentionBuilder().causal()  # Cannot access attribute "causal"
aa.GraphAttentionBuilder().score("nope")  # cannot be assigned to parameter "score"
aa.SparseAttentionBuilder().top_k("3")  # cannot be assigned to parameter "count"
aa.nn.GraphAttention.from_config(aa.AttentionConfig())  # cannot be assigned to parameter "config"
reveal_type(aa.nn.ScaledDotProductAttention.__init__)
reveal_type(aa.nn.MultiHeadAttention.__init__)
reveal_type(aa.nn.SparseAttention.__init__)
reveal_type(aa.nn.GraphAttention.__init__)
reveal_type(aa.nn.DistanceAttention.__init__)
reveal_type(aa.nn.EquivariantAttention.__init__)
reveal_type(aa.nn.GraphAttention(8, 2).config)
reveal_type(aa.AttentionBuilder().qk_norm)
"""


@pytest.fixture(scope="module")
def type_check(tmp_path_factory, require):
    """What pyright says about `_CALLS`, by line: pairs (severity, message)."""
    require("pyright")
    path = tmp_path_factory.mktemp("calls") / "calls.py"
    path.write_text(_CALLS)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=path.parent, check=False)
    said = {}
    for each in json.loads(run.stdout)["generalDiagnostics"]:
        said.setdefault(each["range"]["start"]["line"], []).append((each["severity"], each["message"]))
    return said


@pytest.mark.exhaustive
def test_type_checker_finds_wrong_keywords_and_types_and_no_others(type_check):
    for number, line in enumerate(_CALLS.splitlines()):
        errors = [message for severity, message in type_check.get(number, []) if severity == "error"]
        _, _, expected = line.partition("  # ")
        if expected:
            assert any(expected in message for message in errors), (line, errors)
        else:
            assert not errors, (line, errors)


@pytest.mark.exhaustive
def test_type_checker_shows_each_argument_with_type_and_default(type_check):
    shown = {}
    for number, line in enumerate(_CALLS.splitlines()):
        if line.startswith("reveal_type"):
            ((_, message),) = type_check[number]
            shown[line] = message.partition(" is ")[2]
    for module, names in _ARGUMENTS.items():
        text = shown[f"reveal_type(aa.nn.{module.__name__}.__init__)"]
        found = re.findall(r"(\w+): (.+?) = ([^,)]+)", text)
        assert [name for name, _, _ in found] == names
        for name, kind, default in found:
            expected = {**_SETTINGS, **_BESIDE, **_OWN_DEFAULTS.get(module, {})}[name]
            assert ast.literal_eval(default) == expected[1]
            if name in _SETTINGS:
                assert kind.replace('"', "'") == inspect.formatannotation(expected[0])
    assert shown["reveal_type(aa.nn.GraphAttention(8, 2).config)"] == '"GraphAttentionConfig"'
    assert shown["reveal_type(aa.AttentionBuilder().qk_norm)"] == '"(normalize: bool = True) -> AttentionBuilder"'
