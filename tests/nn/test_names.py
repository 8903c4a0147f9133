"""A module's name: the class's until one is set, kept by copies and not by files, and in its errors."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from anyattention import load, nn, save
from anyattention.errors import InvalidInputError, NumericalInstabilityError
from anyattention.interfaces import Attention
from anyattention.nn import MultiHeadAttention

_KINDS = [getattr(nn, name) for name in nn.__all__ if name not in ("AttentionModule", "KeyValueCache")]


@pytest.mark.parametrize("kind", _KINDS)
def test_a_name_is_set_and_copied(kind: type[Any]) -> None:
    # Some cannot do without their sizes.
    more = {}
    if kind is nn.HeterogeneousGraphAttention:
        more = {"in_features": {"a": 3}, "relations": [("a", "to", "a")]}
    module = kind(8, 2, **more)
    config = module.config
    assert module.name == kind.__name__
    module.name = "encoder"
    assert isinstance(module, Attention)
    copies = (module, module.clone(), copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module)))
    assert [each.name for each in copies] == ["encoder"] * 5
    assert kind(8, 2, **more).name == kind.from_config(config).name == kind.__name__
    assert module.config == config
    assert "encoder" not in module.state_dict()


def test_files_keep_no_name(tmp_path: Path) -> None:
    module = MultiHeadAttention(8, 2)
    module.name = "encoder"
    save(module, tmp_path)
    assert load(tmp_path).name == "MultiHeadAttention"


@pytest.mark.parametrize("name", [3, None, "", b"encoder", torch.ones(1)], ids=repr)
def test_only_text_is_a_name(name: Any) -> None:
    module = MultiHeadAttention(8, 2)
    with pytest.raises(InvalidInputError, match="name: expected a str of at least one character, got"):
        module.name = name
    assert module.name == "MultiHeadAttention"


def test_errors_say_which_module() -> None:
    module = MultiHeadAttention(8, 2, check_finite=True)
    module.name = "encoder"
    with pytest.raises(NumericalInstabilityError, match="encoder output"):
        module(torch.full((1, 2, 8), float("nan")))


def test_a_named_module_compiles_whole() -> None:
    module = MultiHeadAttention(8, 2).eval()
    module.name = "encoder"
    x = torch.randn(1, 3, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).output, module(x).output)
