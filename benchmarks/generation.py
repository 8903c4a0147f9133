"""Text that small models of Hugging Face transformers generate: with our attention, and with PyTorch's ("sdpa").

Random weights: 4 layers, 256 wide, 8 heads, 2 key heads. Greedy, one sequence, one thread. Both give the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from anyattention.interop.huggingface import register
from benchmarks.harness import Timing, measure, print_table, require_tests, write_result

IMPLEMENTATIONS = {"anyattention": "anyattention", "torch SDPA": "sdpa"}
SIZES = {
    "vocab_size": 1_000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16_384,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def main() -> None:
    require_tests("tests/interop/test_huggingface.py", "tests/interop/test_huggingface_generation.py")
    register()
    torch.set_num_threads(1)
    causal = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    windowed = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=128)).eval()
    cases: dict[str, dict[str, Timing]] = {}
    for title, model, prompt, new in (
        ("causal, prompt 512, 256 new tokens", causal, 512, 256),
        ("window 128, prompt 8,192, 256 new tokens", windowed, 8_192, 256),
    ):
        cases[title] = generation(model, prompt, new)
        print_table(title, cases[title])
    write_result("generation", cases)


def generation(model: Any, prompt: int, new: int) -> dict[str, Timing]:
    tokens = torch.randint(1, SIZES["vocab_size"], (1, prompt))

    def generate(implementation: str) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            model.set_attn_implementation(implementation)
            return model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False)

        return call

    calls = {name: generate(implementation) for name, implementation in IMPLEMENTATIONS.items()}
    first, *others = [call() for call in calls.values()]
    assert all(torch.equal(first, other) for other in others), "the tokens differ"
    return measure("anyattention", calls)


if __name__ == "__main__":
    main()
