"""Models of Hugging Face transformers with our attention against their own "eager": logits, gradients, weights."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from huggingface_models import MODELS, VOCABULARY, make_inputs, make_model, real_rows
from torch import Tensor

from anyattention import Causal, Window, explain
from anyattention.errors import InvalidMaskError, MissingExtraError, UnsupportedError
from anyattention.interop import huggingface, huggingface_attention
from anyattention.interop.huggingface_attention import attention


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    huggingface.register()


def results(model: Any, inputs: dict[str, Any], implementation: str) -> list[Tensor]:
    """Logits and weights of the real positions, and the gradients of all parameters by a random cotangent of both."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    found = model(**inputs, output_attentions=True)
    weights = [each for name in found if "attentions" in name for each in found[name]]
    outputs = [real_rows(found[0], inputs, axis=1), *[real_rows(each, inputs, axis=2) for each in weights]]
    assert len(outputs) > 1
    torch.manual_seed(2)
    sum((each * torch.randn_like(each)).sum() for each in outputs).backward()
    return [*outputs, *[torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance * max(1.0, float(other.detach().abs().max()))
        )


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, padded: bool) -> None:
    model, inputs = make_model(name), make_inputs(name, padded=padded)
    assert_same(results(model, inputs, "anyattention"), results(model, inputs, "eager"), 2e-5)


# Of these, no part computes in float32 whatever the dtype.
@pytest.mark.parametrize("name", ["bert"])
def test_float64(name: str) -> None:
    model, inputs = make_model(name, dtype=torch.float64), make_inputs(name, padded=True, dtype=torch.float64)
    assert_same(results(model, inputs, "anyattention"), results(model, inputs, "eager"), 1e-11)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "vit", "t5"])
def test_float64_but_for_parts_in_float32(name: str) -> None:
    model, inputs = make_model(name, dtype=torch.float64), make_inputs(name, padded=False)
    assert_same(results(model, inputs, "anyattention"), results(model, inputs, "eager"), 2e-6)


def trained(model: Any, inputs: dict[str, Any], implementation: str) -> list[Tensor]:
    """Logits, and the gradients of all parameters by them alone: without weights the patterns run."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = real_rows(model(**inputs)[0], inputs, axis=1)
    torch.manual_seed(3)
    (logits * torch.randn_like(logits)).sum().backward()
    return [logits, *[torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_training_without_dropout(name: str, padded: bool) -> None:
    model, inputs = make_model(name).train(), make_inputs(name, padded=padded)
    assert_same(trained(model, inputs, "anyattention"), trained(model, inputs, "eager"), 2e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(name: str, reentrant: bool) -> None:
    model, inputs = make_model(name).train(), make_inputs(name, padded=True)
    wanted = trained(model, inputs, "eager")
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(trained(model, {**inputs, "use_cache": False}, "anyattention"), wanted, 2e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_packed_sequences(name: str) -> None:
    """Positions that start anew, without a mask and a cache, are several sequences in one."""
    model = make_model(name)
    inputs = {"input_ids": torch.randint(1, VOCABULARY, (2, 11)), "use_cache": False}
    inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
    wanted = results(model, inputs, "eager")
    found = results(model, inputs, "anyattention")
    assert_same(found, wanted, 2e-5)
    if name != "gpt_oss":  # which takes them for one sequence
        alone = model(inputs["input_ids"][:1, 6:9], use_cache=False)[0]
        torch.testing.assert_close(model(**inputs)[0][:1, 6:9], alone, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bert"])
@pytest.mark.parametrize("kind", ["boolean", "floating"])
def test_masks_of_the_callers_own(name: str, kind: str) -> None:
    model, inputs = make_model(name), make_inputs(name, padded=False)
    allowed = torch.rand(2, 1, 11, 11) < 0.6
    allowed |= torch.eye(11, dtype=torch.bool)
    floating = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    given = allowed if kind == "boolean" else floating
    if name in ("mistral", "gemma2"):
        inputs["use_cache"] = False
    found = results(model, {**inputs, "attention_mask": given}, "anyattention")
    assert_same(found, results(model, {**inputs, "attention_mask": floating}, "eager"), 2e-5)


def test_a_decoder_without_its_causal_mask() -> None:
    model, inputs = make_model("llama", is_causal=False), make_inputs("llama", padded=True)
    for each in model.model.layers:
        each.self_attn.is_causal = False
    assert_same(results(model, inputs, "anyattention"), results(model, inputs, "eager"), 2e-5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What `attend` is given, checked to run on the compiled kernels."""
    seen: list[tuple[Any, dict[str, Any]]] = []
    attend = huggingface_attention.attend

    def recorded(query: Tensor, key: Tensor, value: Tensor, pattern: Any, **settings: Any) -> Any:
        assert explain(query, key, value, pattern, **settings).implementation == "cpu"
        seen.append((pattern, settings))
        return attend(query, key, value, pattern, **settings)

    monkeypatch.setattr(huggingface_attention, "attend", recorded)
    return seen


def attended(calls: list[tuple[Any, dict[str, Any]]], name: str, *, padded: bool) -> None:
    calls.clear()
    model = make_model(name)
    model.set_attn_implementation("anyattention")
    model(**make_inputs(name, padded=padded))


@pytest.mark.usefixtures("native")
def test_masks_are_patterns(calls: list[tuple[Any, dict[str, Any]]]) -> None:
    """No matrix of all pairs: a pattern, beside one row of keys for padding."""
    window, causal = Window(3, 0, align="bottom_right"), Causal(align="bottom_right")
    attended(calls, "llama", padded=False)
    assert [(pattern, settings["mask"]) for pattern, settings in calls] == [(causal, None)] * 2
    attended(calls, "llama", padded=True)
    assert [pattern for pattern, _ in calls] == [causal] * 2
    assert {settings["mask"].shape for _, settings in calls} == {(2, 1, 1, 11)}
    attended(calls, "mistral", padded=False)
    assert [(pattern, settings["mask"]) for pattern, settings in calls] == [(window, None)] * 2
    attended(calls, "gemma2", padded=True)
    assert [pattern for pattern, _ in calls] == [window, causal]
    assert {settings["mask"].shape for _, settings in calls} == {(2, 1, 1, 11)}
    attended(calls, "bert", padded=True)
    assert [(pattern, settings["mask"].shape) for pattern, settings in calls] == [(None, (2, 1, 1, 11))] * 2
    attended(calls, "vit", padded=False)
    assert [(pattern, settings["mask"]) for pattern, settings in calls] == [(None, None)] * 2


class Layer(torch.nn.Module):
    is_causal = False


def test_dropout() -> None:
    """Of identity values the output is the weights: each is dropped, or divided by what is kept on average."""
    torch.manual_seed(1)
    query, key = torch.randn(2, 3, 17, 5), torch.randn(2, 3, 40, 5)
    value = torch.eye(40).expand(2, 3, 40, 40)
    layer = Layer()
    dropped, weights = attention(layer, query, key, value, None, dropout=0.25, output_attentions=True)
    assert weights is not None
    dropped = dropped.transpose(1, 2)
    is_kept = dropped != 0
    torch.testing.assert_close(dropped[is_kept], weights[is_kept] / 0.75)
    # 4,080 draws: six standard deviations.
    assert abs(float(is_kept.double().mean()) - 0.75) < 6 * (0.75 * 0.25 / is_kept.numel()) ** 0.5
    torch.testing.assert_close(weights, torch.softmax(query @ key.mT / 5**0.5, -1))
    whole, _ = attention(layer.eval(), query, key, value, None, dropout=0.25)
    torch.testing.assert_close(whole.transpose(1, 2), weights)


def test_a_query_for_the_whole_batch() -> None:
    query, key = torch.randn(1, 2, 3, 4), torch.randn(5, 2, 6, 4)
    found, _ = attention(Layer(), query, key, key, None)
    wanted = torch.softmax(query @ key.mT / 2, -1) @ key
    torch.testing.assert_close(found, wanted.transpose(1, 2))


def test_what_is_unknown_is_refused() -> None:
    x, layer = torch.randn(1, 2, 3, 4), Layer()
    for name in ("head_mask", "indices", "sinks", "alibi"):
        with pytest.raises(UnsupportedError, match=f"does not know {name}"):
            attention(layer, x, x, x, None, **{name: torch.ones(2)})
        attention(layer, x, x, x, None, **{name: None})
    with pytest.raises(UnsupportedError, match=r"cu_seq_lens_q.*position_ids"):
        attention(layer, x, x, x, None, cu_seq_lens_q=torch.tensor([0, 1, 3]))
    with pytest.raises(InvalidMaskError, match=r"attention_mask: expected boolean.*int64"):
        attention(layer, x, x, x, torch.ones(1, 1, 3, 3, dtype=torch.int64))
    model, inputs = make_model("llama"), make_inputs("llama", padded=False)
    model.set_attn_implementation("anyattention")
    with pytest.raises(UnsupportedError, match="head_mask"):
        model(**inputs, head_mask=torch.ones(4))
    with pytest.raises(UnsupportedError, match=r"cu_seq_lens_k"):
        model(**inputs, cu_seq_lens_k=torch.tensor([0, 11]))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_models_without_the_interface_are_refused(compiled: bool) -> None:
    """They would take a boolean mask for numbers to add."""
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    model = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes, attn_implementation="anyattention"))
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    # PyTorch cannot trace the making of the error, and shows the line.
    said = "raise UnsupportedError" if compiled else "BloomConfig computes its attention by itself"
    with torch.no_grad(), pytest.raises(Exception if compiled else UnsupportedError, match=said):
        call(torch.ones(1, 3, dtype=torch.int64))


def test_registering_again_changes_nothing() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    before = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    huggingface.register()
    assert (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping) == before


def test_transformers_is_imported_when_it_is_asked_for() -> None:
    code = """
import sys
import anyattention.interop.huggingface as huggingface
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
try:
    huggingface.register()
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("MissingExtraError")
    assert "anyattention[huggingface]" in done.stdout


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.4.1")
    with pytest.raises(MissingExtraError, match=r"transformers: expected 5\.5 or later, got 5\.4\.1"):
        huggingface.register()
