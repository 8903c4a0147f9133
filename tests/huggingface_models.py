"""Tiny models of Hugging Face transformers with random weights, and inputs for them."""

from typing import Any

import torch
from torch import Tensor

MODELS = (
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "gpt2",
    "bigbird_pegasus",
    "bert",
    "modernbert",
    "vit",
    "t5",
)
VOCABULARY = 31
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attention_dropout": 0.0,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 64,
}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}


def make_model(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model in evaluation mode, the same for the same name."""
    import transformers as hf

    grouped = {**_COMMON, "num_key_value_heads": 2, "head_dim": 6}
    makers: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, grouped),
        "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {**grouped, "sliding_window": 4}),
        "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, grouped),
        "gemma2": (
            hf.Gemma2Config,
            hf.Gemma2ForCausalLM,
            {**grouped, **_ALTERNATING, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 5},
        ),
        "gemma3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, {**grouped, **_ALTERNATING}),
        "gpt_oss": (
            hf.GptOssConfig,
            hf.GptOssForCausalLM,
            {**grouped, **_ALTERNATING, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": None},
        ),
        # It does not pass output_attentions on to its layers.
        "gpt2": (
            hf.GPT2Config,
            hf.GPT2LMHeadModel,
            {**_COMMON, "n_inner": 20, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
        ),
        # Its layers do not say that they are causal.
        "bigbird_pegasus": (
            hf.BigBirdPegasusConfig,
            hf.BigBirdPegasusForCausalLM,
            {
                "vocab_size": VOCABULARY,
                "d_model": 16,
                "decoder_layers": 2,
                "decoder_attention_heads": 4,
                "decoder_ffn_dim": 20,
                "dropout": 0.0,
                "init_std": 0.3,
                "max_position_embeddings": 64,
                "is_encoder_decoder": False,
                "pad_token_id": 0,
                "eos_token_id": None,
            },
        ),
        "bert": (
            hf.BertConfig,
            hf.BertForMaskedLM,
            {**_COMMON, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
        ),
        "modernbert": (
            hf.ModernBertConfig,
            hf.ModernBertForMaskedLM,
            {**_COMMON, "local_attention": 6, "layer_types": _ALTERNATING["layer_types"], "cls_token_id": 1},
        ),
        "vit": (
            hf.ViTConfig,
            hf.ViTForImageClassification,
            {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 20,
                "image_size": 12,
                "patch_size": 4,
                "num_channels": 1,
                "hidden_dropout_prob": 0.0,
                "initializer_range": 0.3,
            },
        ),
        "t5": (
            hf.T5Config,
            hf.T5ForConditionalGeneration,
            {
                "vocab_size": VOCABULARY,
                "d_model": 16,
                "d_kv": 6,
                "d_ff": 20,
                "num_layers": 2,
                "num_heads": 4,
                "dropout_rate": 0.0,
                "initializer_factor": 1.0,
                "relative_attention_num_buckets": 8,
                "relative_attention_max_distance": 10,
                "pad_token_id": 0,
                "eos_token_id": None,
                "decoder_start_token_id": 1,
            },
        ),
    }
    make_config, make, settings = makers[name]
    torch.manual_seed(len(name))
    model = make(make_config(**{**settings, **changes})).to(dtype).eval()
    with torch.no_grad():
        for kind, parameter in model.named_parameters():
            if "sinks" in kind:
                parameter.copy_(torch.randn_like(parameter))
    return model


def make_inputs(name: str, *, padded: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of a call: two sequences of 11 tokens, of which one has padding on its left."""
    torch.manual_seed(7)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 1, 12, 12, dtype=dtype)}
    inputs: dict[str, Any] = {"input_ids": torch.randint(1, VOCABULARY, (2, 11))}
    if padded:
        inputs["attention_mask"] = torch.ones(2, 11, dtype=torch.int64)
        inputs["attention_mask"][0, :3] = 0
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(1, VOCABULARY, (2, 9))
    return inputs


def real_rows(x: Tensor, inputs: dict[str, Any], *, axis: int) -> Tensor:
    """The rows of queries that are no padding; those of a decoder or of images all are."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or x.shape[axis] != mask.shape[1]:
        return x
    shape = [1] * x.ndim
    shape[0], shape[axis] = mask.shape
    return torch.where(mask.bool().view(shape), x, 0.0)
