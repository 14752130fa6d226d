"""Every causal language model of the installed transformers, tiny and random.

Settings that make a model small are offered by name, and each config takes those that it knows. A
few models need more than that; a few cannot be had small, and why is said.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

VOCAB = 64
LARGEST = 10_000_000  # parameters

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    # a window shorter than the texts
    "sliding_window": 8,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
    # states
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "state_size": 8,
    # pictures and sound
    "vision_config": None,
    "audio_config": None,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "ffn_dim": 48,
    "n_inner": 48,
    "rotary_dim": 4,
}

# What single models need; ... stands for the config's own default.
_LATENT = {"head_dim": ..., "num_key_value_heads": 4}
_LAYERS = ["linear_attention", "full_attention"] * 2
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "minicpm3",
            "youtu",
        ),
        _LATENT,
    ),
    "bailing_hybrid": {**_LATENT, "layer_types": _LAYERS},
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "granitemoehybrid": {"layer_types": _LAYERS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_LATENT, "layer_types": _LAYERS, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {**_LATENT, "num_layers": 2, "head_dim": 8, "expert_ffn_hidden_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "nemotron_h": {"n_groups": 1},
    "reformer": {"axial_pos_embds": False, "num_buckets": 4, "attn_layers": ["local"] * 2},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}

# Names that cannot be built tiny from their config alone, and why.
NOT_TINY: dict[str, str] = {
    "blt": "its parts have configs of their own",
    "cohere_compass_text": "its layers have rotary angles of their own, which no default gives",
    "dbrx": "its config lacks what its model reads",
    "dots3_note": "its picture part is large",
    "dots3_note_text": "its experts are large whatever the config says",
    "fuyu": "its language model is Persimmon, which is here",
    "gemma3": "its text part is gemma3_text, which is here",
    "gemma3n": "timm is not installed",
    "gemma3n_text": "its layers share caches in a pattern of their own",
    "gemma4_assistant": "it drafts for another model",
    "gemma4_unified_assistant": "it drafts for another model",
    "git": "its picture part is large",
    "got_ocr2": "its picture part is large",
    "moss_transcribe_diarize": "its sound part is large",
    "musicgen": "it makes sound",
    "musicgen_melody": "it makes sound",
    "phi4_multimodal": "its picture and sound parts are large",
    "qwen4_exp": "its config lacks defaults that its model reads",
    "qwen4_exp_text": "its config lacks defaults that its model reads",
    "reformer": "its backward is its own and wants training mode",
    "zamba": "its tied layers cannot be found again in few layers",
    "zamba2": "its tied layers cannot be found again in few layers",
}
# What stands behind a token changes what these say there: they are refused.
NOT_CAUSAL = {"cpmant", "prophetnet", "xlm", "xlnet"}
# `generate` counts positions otherwise than these models' own forward pass does.
OTHER_POSITIONS = {
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
}  # fmt: skip
# What these say with transformers' cache, or with beams over it, is not what they say without.
CACHE_DIFFERS = {"minimax", "moshi", "recurrent_gemma", "rwkv", "xlstm"}


def names() -> list[str]:
    """The model types that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config_of(name: str) -> Any:
    """A small config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    given = {**_given(kind), **OWN.get(name, {})}
    return kind(**{k: v for k, v in given.items() if v is not ...})


def _given(kind: Any) -> dict[str, Any]:
    fields = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    mapped = set(getattr(kind, "attribute_map", {}))
    given = {k: v for k, v in SMALL.items() if (k in fields or k in mapped) and v is not None}
    text = getattr(kind, "sub_configs", {}).get("text_config")
    if text is not None and "text_config" in fields and dataclasses.is_dataclass(text):
        given = {"text_config": _given(text)}
    return given


def build(name: str) -> Any:
    """A frozen random model in evaluation mode, none of whose weights is zero or one.

    Raises: whatever transformers raises; ValueError where it is not small.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = config_of(name)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
        else:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.generation_config = GenerationConfig()  # no tokens that are forced
    return model.requires_grad_(False)
