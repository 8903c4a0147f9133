"""Text that models of Hugging Face transformers generate with our attention, token for token that of "eager"."""

from typing import Any

import pytest
import torch
from huggingface_models import VOCABULARY, make_inputs, make_model
from torch import Tensor

from anyattention.interop import huggingface

DECODERS = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "t5")
WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "in chunks": {"prefill_chunk_size": 3},
}
CASES = [(name, way) for name in DECODERS for way in WAYS if name != "t5" or way not in ("static", "in chunks")]


@pytest.fixture(autouse=True, scope="module")
def _registered(require: Any) -> None:
    require("transformers")
    huggingface.register()


def generated(model: Any, inputs: dict[str, Any], implementation: str, **settings: Any) -> tuple[Tensor, list[Tensor]]:
    """Tokens, and the scores of the last step."""
    model.set_attn_implementation(implementation)
    found = model.generate(
        **inputs, max_new_tokens=9, do_sample=False, return_dict_in_generate=True, output_scores=True, **settings
    )
    return found.sequences, list(found.scores)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("name", "way"), CASES)
def test_generation(name: str, padded: bool, way: str) -> None:
    """Eleven tokens and nine more pass windows of four."""
    model, inputs = make_model(name), make_inputs(name, padded=padded)
    inputs.pop("decoder_input_ids", None)
    tokens, scores = generated(model, inputs, "anyattention", **WAYS[way])
    wanted, wanted_scores = generated(model, inputs, "eager", **WAYS[way])
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(scores, wanted_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("length", [1, 3, 4, 5])
def test_prompts_around_the_windows_width(name: str, length: int) -> None:
    model = make_model(name)
    inputs = {"input_ids": torch.randint(1, VOCABULARY, (2, length)), "attention_mask": torch.ones(2, length).long()}
    for way in ("dynamic", "static"):
        tokens, scores = generated(model, inputs, "anyattention", **WAYS[way])
        wanted, wanted_scores = generated(model, inputs, "eager", **WAYS[way])
        assert torch.equal(tokens, wanted)
        torch.testing.assert_close(scores, wanted_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("chunks", [(5, 4, 2), (1, 1, 9), (3, 1, 1, 6)], ids=str)
def test_a_prompt_in_pieces(name: str, padded: bool, chunks: tuple[int, ...]) -> None:
    """Several queries after stored keys; the logits are those of the whole prompt too."""
    import transformers

    model, inputs = make_model(name), make_inputs(name, padded=padded)
    found: dict[str, list[Tensor]] = {"anyattention": [], "eager": []}
    real = inputs.get("attention_mask", torch.ones(2, 11)).bool()[..., None]
    for implementation, logits in found.items():
        model.set_attn_implementation(implementation)
        cache, end = transformers.DynamicCache(config=model.config), 0
        for size in chunks:
            start, end = end, end + size
            given = {"input_ids": inputs["input_ids"][:, start:end], "use_cache": True, "cache": cache}
            if padded:
                given["attention_mask"] = inputs["attention_mask"][:, :end]
            logits.append(torch.where(real[:, start:end], model(**given).logits.detach(), 0.0))
    torch.testing.assert_close(found["anyattention"], found["eager"], rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("anyattention")
    whole = torch.where(real, model(**inputs).logits, 0.0)
    torch.testing.assert_close(torch.cat(found["anyattention"], 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "padded"),
    [
        ("mistral", True),
        *[
            pytest.param(name, padded, marks=pytest.mark.exhaustive)
            for name in ("llama", "mistral", "gemma2", "gpt_oss", "bert")
            for padded in (False, True)
            if (name, padded) != ("mistral", True)
        ],
    ],
)
def test_compiled_whole(name: str, padded: bool) -> None:
    model, inputs = make_model(name), make_inputs(name, padded=padded)
    model.set_attn_implementation("eager")
    settings = {} if name == "bert" else {"use_cache": False}
    real = inputs.get("attention_mask", torch.ones(2, 11)).bool()[..., None]
    wanted = torch.where(real, model(**inputs, **settings).logits, 0.0)
    model.set_attn_implementation("anyattention")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    found = torch.where(real, compiled(**inputs, **settings).logits, 0.0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    parameters = list(model.parameters())
    cotangent = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, parameters, cotangent, allow_unused=True),
        torch.autograd.grad(wanted, parameters, cotangent, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_compiled_steps_of_a_static_cache(padded: bool) -> None:
    """One code for all steps. That of a window's cache counts in Python, and is compiled for each length."""
    model, inputs = make_model("llama"), make_inputs("llama", padded=padded)
    wanted, _ = generated(model, inputs, "eager", cache_implementation="static")
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager", dynamic=False)
    found, _ = generated(model, inputs, "anyattention", cache_implementation="static")
    assert torch.equal(found, wanted)
