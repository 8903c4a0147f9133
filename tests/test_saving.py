"""Saving: bit for bit, atomic, and never a pickle."""

import ast
import json
import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

import anyattention
from anyattention import (
    AttentionConfig,
    GeometricAttentionConfig,
    Graph,
    GraphAttentionConfig,
    load,
    save,
)
from anyattention.errors import InvalidConfigError, InvalidInputError
from anyattention.files import make_folder, write_atomically
from anyattention.nn import (
    DistanceAttention,
    EquivariantAttention,
    GraphAttention,
    MultiHeadAttention,
    ScaledDotProductAttention,
    SparseAttention,
)
from anyattention.training import NodeClassifier

_SOURCE = Path(anyattention.__file__).parent
# Folders that version 0.1 saved, each with a call: the arguments and the output.
_SAVED = Path(__file__).parent / "data" / "saved"
_EDGE_INDEX = torch.tensor([[0, 1, 0], [2, 2, 3]])

_MODULES = {
    "scaled_dot_product": lambda: ScaledDotProductAttention(6, 3, scale=0.3, causal=True),
    "multi_head": lambda: MultiHeadAttention(6, 3, use_bias=False, dropout=0.3),
    "multi_head_all": lambda: MultiHeadAttention(6, 3, positions="learned", qk_norm=True, max_seq_len=11, eps=1e-3),
    "multi_head_sinusoidal": lambda: MultiHeadAttention(6, 3, positions="sinusoidal", max_seq_len=7),
    "gat": lambda: GraphAttention(6, 3, in_features=(2, 5), score="additive", edge_dim=7, residual=True),
    "gatv2": lambda: GraphAttention(6, 3, in_features=5, concat=False, aggregation="max"),
    "transformer": lambda: GraphAttention(6, 3, in_features=5, score="dot", edge_dim=7, normalize=False),
    "sparse": lambda: SparseAttention(6, 3, sparsity_pattern="fixed", block_size=3, causal=True, qk_norm=True),
    "chosen keys": lambda: SparseAttention(6, 3, sparsity_pattern="top_k", top_k=3, use_bias=False),
    "distance": lambda: DistanceAttention(6, 3, geometric_dim=2, radius=1.5, radial_basis="bessel", num_radial=4),
    "equivariant": lambda: EquivariantAttention(6, 3, radial_range=1.5, vector_channels=6, use_bias=False),
    "equivariant to all": lambda: EquivariantAttention(6, 3, eps=1e-3),
    "classifier": lambda: NodeClassifier(5, 3, hidden=6, heads=3, residual=True, layer_norm=True),
}


def _randomized(name, dtype=None):
    module = _MODULES[name]().to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def _same_bits(one, other):
    states = one.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype
        assert torch.equal(tensor, states[1][name])


def _settings(told):
    """Those of a config.json by name, the base's among them; older files lack newer ones."""
    return {"module": told["module"]} | told["config"].get("base", {}) | told["config"] | {"base": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", _MODULES)
def test_a_module_comes_back_bit_for_bit(name, dtype, tmp_path):
    module = _randomized(name, dtype)
    save(module, tmp_path / "new" / "folder")
    loaded = load(tmp_path / "new" / "folder")
    assert type(loaded) is type(module)
    assert loaded.config == module.config
    assert not loaded.training
    _same_bits(module, loaded)
    for parameter in loaded.parameters():
        assert parameter.requires_grad
        assert parameter.dtype == dtype


def test_the_loaded_module_computes_the_same(tmp_path):
    x = torch.randn(2, 7, 6)
    module = _randomized("multi_head_sinusoidal").eval()
    save(module, tmp_path)
    assert torch.equal(load(tmp_path)(x).output, module(x).output)


def test_the_loaded_graph_module_computes_the_same(tmp_path):
    module = _randomized("gat").eval()
    save(module, tmp_path)
    graph = Graph.from_edge_index(_EDGE_INDEX, num_queries=4, num_keys=3)
    arguments = (torch.randn(3, 2), torch.randn(4, 5)), graph, torch.randn(3, 7)
    assert torch.equal(load(tmp_path)(*arguments).output, module(*arguments).output)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "multi_head",
            AttentionConfig(
                6, 2, 0.3, scale=0.7, max_seq_len=7, causal=True, eps=1e-3, positions="learned", qk_norm=True
            ),
        ),
        (
            "graph",
            GraphAttentionConfig(
                AttentionConfig(6, 3),
                edge_dim=2,
                aggregation="mean",
                negative_slope=0.3,
                score="additive",
                in_features=5,
                concat=False,
                residual=True,
            ),
        ),
        (
            "equivariant",
            GeometricAttentionConfig(
                AttentionConfig(6, 2, use_bias=False, eps=1e-4, check_finite=True),
                radius=2.5,
                radial_basis="bessel",
                num_radial=5,
                vector_channels=4,
            ),
        ),
    ],
)
def test_a_folder_of_before_loads_and_computes_the_same(name, config, tmp_path):
    module = load(_SAVED / name)
    assert module.config == config
    call = safetensors.torch.load_file(_SAVED / name / "call.safetensors")
    expected = call.pop("output")
    # Other processors and PyTorch's other versions round in other places.
    torch.testing.assert_close(module(**call).output, expected, rtol=1e-12, atol=1e-12)
    save(module, tmp_path)
    saved, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, _SAVED / name))
    assert _settings(saved) | _settings(before) == _settings(saved)
    _same_bits(module, load(tmp_path))


def test_a_trained_view_of_larger_memory_is_saved(tmp_path):
    module = MultiHeadAttention(6, 3)
    module.query_projection.weight = torch.nn.Parameter(torch.randn(6, 12)[:, ::2])
    save(module, tmp_path)
    _same_bits(module, load(tmp_path))


def test_files_are_safetensors_and_json_only(tmp_path):
    save(_randomized("gat"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["module"] == "GraphAttention"
    assert settings["config"]["in_features"] == [2, 5]
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy") as weights:
        assert set(weights.keys()) == set(_randomized("gat").state_dict())


def test_saving_again_replaces(tmp_path):
    save(_randomized("multi_head"), tmp_path)
    module = _randomized("gatv2")
    save(module, tmp_path)
    _same_bits(module, load(tmp_path))


def test_files_have_the_permissions_of_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        save(_randomized("multi_head"), tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


class _Crash(BaseException):
    """What no `except Exception` catches, as Ctrl-C."""


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("fault", [_Crash, OSError])
def test_a_crash_leaves_the_old_file_and_no_other(step, fault, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*arguments, **more):
        raise fault(28, "No space left on device")

    monkeypatch.setattr(step, fail)
    expected = InvalidInputError if fault is OSError else _Crash
    with pytest.raises(expected, match="No space left on device"):
        write_atomically(path, b"new" * 1000)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_while_saving_leaves_a_folder_that_loads(tmp_path, monkeypatch):
    module = _randomized("multi_head")
    save(module, tmp_path)

    def fail(*arguments):
        raise _Crash("power cut")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(_Crash, match="power cut"):
        save(_randomized("multi_head"), tmp_path)
    monkeypatch.undo()
    _same_bits(module, load(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_readers_see_the_whole_file_or_none(tmp_path, monkeypatch):
    seen = []
    path = tmp_path / "file"
    fsync = os.fsync

    def look(descriptor):
        seen.append(path.exists())
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", look)
    write_atomically(path, b"new")
    assert seen == [False]
    assert path.read_bytes() == b"new"


def _write(folder, settings, weights=None):
    (folder / "config.json").write_text(json.dumps(settings))
    safetensors.torch.save_file(weights or {"x": torch.ones(1)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"module": "Linear", "config": {}}, "module: expected one of .*, got 'Linear'"),
        ({"module": "os.system", "config": {}}, "module: expected one of .*, got 'os.system'"),
        ({"module": "anyattention.nn.MultiHeadAttention", "config": {}}, "module: expected one of .*, got 'anyatt"),
        ({"module": "__class__", "config": {}}, "module: expected one of .*, got '__class__'"),
        ({"module": ["MultiHeadAttention"], "config": {}}, "module: expected one of .*, got \\['Multi"),
        ({"module": None, "config": {}}, "module: expected one of .*, got None"),
        ({"module": "MultiHeadAttention"}, "expected the keys module, config, got module"),
        ({"module": "MultiHeadAttention", "config": {}, "home": "os"}, "expected the keys module, config, got .*home"),
        ([], "expected the keys module, config, got list"),
        ({"module": "MultiHeadAttention", "config": None}, "AttentionConfig: expected a dictionary, got NoneType"),
        ({"module": "MultiHeadAttention", "config": {"device": "cpu"}}, "only the fields .*, got 'device'"),
        ({"module": "MultiHeadAttention", "config": {"d_model": "8"}}, "d_model: expected an int .*, got '8'"),
        ({"module": "MultiHeadAttention", "config": {"eps": {}}}, "eps: expected a finite number above 0, got {}"),
        ({"module": "GraphAttention", "config": {"base": {"x": 1}}}, "only the fields .*, got 'x'"),
        ({"module": "GraphAttention", "config": {"base": 1}}, "AttentionConfig: expected a dictionary, got int"),
        ({"module": "SparseAttention", "config": {"pattern": "os"}}, "only the fields .*, got 'pattern'"),
        ({"module": "NodeClassifier", "config": {"x": 1}}, "only the fields .*, got 'x'"),
    ],
)
def test_malicious_settings_are_refused(settings, message, tmp_path):
    _write(tmp_path, settings)
    with pytest.raises(InvalidConfigError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"d_model": 10**7, "num_heads": 1}, "Missing key"),
        ({"max_seq_len": 2**31 - 1, "positions": "learned"}, "Missing key"),
        ({"d_model": 2**31 - 8}, "overflow"),
    ],
)
def test_settings_cannot_ask_for_memory_that_the_weights_do_not_fill(config, fault, tmp_path):
    _write(tmp_path, {"module": "MultiHeadAttention", "config": config})
    # The fault is found in the names: no allocator was asked.
    with pytest.raises(InvalidInputError, match=rf"(?s)the weights do not fit config\.json: .*{fault}"):
        load(tmp_path)


def test_tables_are_not_larger_than_the_weights_allow(tmp_path):
    weights = MultiHeadAttention(8, 2).state_dict()
    _write(tmp_path, {"module": "MultiHeadAttention", "config": {"d_model": 8, "num_heads": 2}}, weights)
    settings = json.loads((tmp_path / "config.json").read_text())
    for max_seq_len, is_refused in ((1 << 20, False), (1 << 28, True)):
        settings["config"] |= {"positions": "sinusoidal", "max_seq_len": max_seq_len}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        if is_refused:
            with pytest.raises(InvalidConfigError, match=r"at most .* bytes beside such weights, got 8,589,934,592"):
                load(tmp_path)
        else:
            load(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 8, 100, -1])
def test_truncated_weights_are_refused(length, tmp_path):
    save(_randomized("multi_head"), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InvalidInputError, match=r"model\.safetensors: expected a readable safetensors file, got .+"):
        load(tmp_path)


def test_a_pickle_is_not_read(tmp_path):
    save(_randomized("multi_head"), tmp_path)
    torch.save({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidInputError, match="expected a readable safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name, tmp_path):
    module = _randomized("multi_head")
    _write(tmp_path, {"module": "MultiHeadAttention", "config": module.config.to_dict()}, module.state_dict())
    (tmp_path / name).unlink()
    with pytest.raises(InvalidInputError, match=f"{name}: expected a readable .*No such file"):
        load(tmp_path)


@pytest.mark.parametrize("change", ["shape", "missing", "extra", "dtype"])
def test_weights_that_do_not_fit_are_refused(change, tmp_path):
    module = _randomized("multi_head")
    save(module, tmp_path)
    weights = dict(module.state_dict())
    name = "key_projection.weight"
    if change == "shape":
        weights[name] = torch.ones(6, 5)
    elif change == "missing":
        del weights[name]
    elif change == "extra":
        weights["hook"] = torch.ones(1)
    else:
        weights[name] = weights[name].long()
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    fault = {"extra": "fit config.json: .*hook", "dtype": "weights of one floating-point dtype of 16, 32 or 64 bits"}
    with pytest.raises(InvalidInputError, match="(?s)" + fault.get(change, "fit config.json: .*key_projection")):
        load(tmp_path)


def test_the_settings_go_with_the_weights(tmp_path):
    """Two models of the same shapes and other heads: which one a folder has is decided by one file."""
    two, three = MultiHeadAttention(6, 2), MultiHeadAttention(6, 3)
    save(two, tmp_path / "two")
    save(three, tmp_path / "three")
    (tmp_path / "three" / "model.safetensors").replace(tmp_path / "two" / "model.safetensors")
    with pytest.warns(UserWarning, match=r"config\.json is not what .*model\.safetensors was saved with"):
        assert load(tmp_path / "two").config.num_heads == 3
    (tmp_path / "two" / "config.json").unlink()
    assert load(tmp_path / "two").config.num_heads == 3


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float32", "bfloat16"), ("int64",), ("complex64",)])
def test_weights_have_one_floating_dtype(dtypes, tmp_path):
    module = _randomized("multi_head")
    save(module, tmp_path)
    weights = {
        name: x.to(getattr(torch, dtypes[n % len(dtypes)])) for n, (name, x) in enumerate(module.state_dict().items())
    }
    settings = safetensors.safe_open(tmp_path / "model.safetensors", "pt").metadata()
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", settings)
    found = ", ".join(sorted(f"torch.{name}" for name in dtypes))
    with pytest.raises(InvalidInputError, match=f"expected weights of one floating-point dtype .*, got {found}"):
        load(tmp_path)


def test_weights_that_are_no_numbers_are_named(tmp_path):
    module = _randomized("multi_head")
    with torch.no_grad():
        module.key_projection.weight[1, 2] = torch.nan
    save(module, tmp_path)
    with pytest.raises(
        InvalidInputError, match=r"expected weights that are numbers, got NaN in key_projection\.weight"
    ):
        load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_read(kind, name, tmp_path):
    module = _randomized("multi_head")
    _write(tmp_path, {"module": "MultiHeadAttention", "config": module.config.to_dict()}, module.state_dict())
    (tmp_path / name).unlink()
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "device":
        (tmp_path / name).symlink_to("/dev/zero")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(InvalidInputError, match=rf"{name}: expected a readable .*, got not a file"):
        load(tmp_path)


def test_a_large_config_is_not_read(tmp_path):
    module = _randomized("multi_head")
    _write(tmp_path, {"module": "MultiHeadAttention", "config": module.config.to_dict()}, module.state_dict())
    with open(tmp_path / "config.json", "ab") as file:
        file.truncate(1 << 21)
    with pytest.raises(InvalidConfigError, match=r"config\.json: expected settings, got over 1,048,576 bytes"):
        load(tmp_path)


def test_a_folder_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidInputError, match="file/folder: expected a folder, got Not a directory"):
        save(_randomized("multi_head"), tmp_path / "file" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_read_only_folder_is_named(tmp_path, monkeypatch):
    # Root may write everywhere, so the question is answered here.
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(InvalidInputError, match="expected a writable folder, got read-only"):
        make_folder(tmp_path)


def test_modules_of_others_are_not_saved(tmp_path):
    class GraphAttention(torch.nn.Module):
        pass

    for module in (torch.nn.Linear(2, 2), GraphAttention()):
        with pytest.raises(InvalidInputError, match=f"module: expected one of .*got {type(module).__name__}"):
            save(module, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_nothing_is_unpickled_or_evaluated_anywhere():
    forbidden_modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for path in _SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & forbidden_modules, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden_modules, path
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load"}, path
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", path
