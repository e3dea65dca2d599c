"""Tiny, randomly initialized models of every model type that transformers can build at such a size.

A configuration is the type's own default with small sizes: `SIZES` says which number a field of that name gets, and
`OWN` what single types need besides.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto


VOCABULARY, WIDTH = 97, 16
LARGEST = 3_000_000  # parameters: a larger model has a size that is not in the tables

# Sizes by the name of their field.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_vocab", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "emb_dim", "embed_dim", "dim", "embedding_size", "word_embed_proj_dim"),
        WIDTH,
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "decoder_num_layers"), 2),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
        ),
        2,
    ),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "decoder_num_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 1),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "attention_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "n_inner", "dff", "encoder_ffn_dim"), 32
    ),
    **dict.fromkeys(("decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"), 128),
    **dict.fromkeys(("max_sequence_length", "max_target_positions"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 2),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 4),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 4),
    **dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "resid_pdrop"), 0.0),
    **dict.fromkeys(("embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "decoder_start_token_id": 2,
    "initializer_range": 0.2,
    "sliding_window": 64,
}
_PAIRS = {"num_key_value_heads": 2}  # as many as attention heads
_FOUR_LAYERS = {"num_hidden_layers": 4}  # of which the last one is attention
_CONV = {"layer_types": ["conv", "full_attention"]}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "diffllama", "dots3_note"), _PAIRS),
    **dict.fromkeys(("dots3_note_text", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu", "nemotron"), _PAIRS),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), _FOUR_LAYERS),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text", "recurrent_gemma"), _FOUR_LAYERS),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _ROPE),
    **dict.fromkeys(("lfm2_moe", "lfm3"), _CONV),
    "bailing_hybrid": {**_FOUR_LAYERS, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "dots1": {"first_k_dense_replace": 2},
    "falcon_h1": {"mamba_d_ssm": 32},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "longformer": {"attention_window": 4},
    "led": {"attention_window": 4},
    "mamba2": {"num_heads": 4},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "reformer": {"is_decoder": True},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "xlm": {"pad_index": 0, "mask_token_id": 5},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layer_types": ["mamba", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
}


# transformers' mapping for each of PEFT's task types.
MAPPINGS = {
    "CAUSAL_LM": "CAUSAL_LM",
    "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
}
# Model types that are not built: they have parts for images, sounds or layouts with sizes of their own, need a package
# or inputs besides text, or their default configuration is not valid at these sizes.
NOT_BUILT = {
    task: frozenset(kinds.split())
    for task, kinds in {
        "CAUSAL_LM": "bailing_hybrid blt cohere_compass_text dbrx deepseek_v2 fuyu gemma3 gemma3n gemma4_assistant "
        "gemma4_unified gemma4_unified_assistant got_ocr2 hunyuan_v1_dense hunyuan_v1_moe kimi_linear longcat_flash "
        "ministral moshi moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal qwen4_exp qwen4_exp_text "
        "reformer roc_bert xlstm zamba zamba2",
        "SEQ_2_SEQ_LM": "audioflamingo3 encoder-decoder glmasr granite_speech granite_speech_plus "
        "moss_transcribe_diarize musicflamingo nemo_speechlm qwen2_audio qwen3_asr t5gemma2 vibevoice_asr voxtral "
        "voxtral_realtime",
        "SEQ_CLS": "bart bigbird_pegasus cohere_compass_text deepseek_v2 esm esmc gemma3 hunyuan_v1_dense "
        "hunyuan_v1_moe layoutlmv2 layoutlmv3 lilt luke mbart ministral mistral4 modernvbert mt5 mvp perceiver plbart "
        "qwen3_5 reformer roc_bert t5 t5gemma2 ultravbert umt5 zamba zamba2",
        "TOKEN_CLS": "bros esm esmc layoutlmv2 layoutlmv3 lilt luke ministral mistral4 modernvbert qwen3_5 qwen3_asr "
        "roc_bert t5gemma2 ultravbert",
        "QUESTION_ANS": "layoutlmv2 layoutlmv3 lilt longformer luke lxmert ministral reformer roc_bert",
    }.items()
}


def build(model_type: str, class_name: str) -> Any:
    """Build a model of a class in eval mode, with the same weights at each call.

    Raises:
        ValueError: If it is not tiny.
    """
    model_class = getattr(transformers, class_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = model_class.config_class(**_fields(model_class.config_class, OWN.get(model_type, {})))
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > LARGEST:
            raise ValueError(
                f"{class_name} has {size:,} parameters: a size of its configuration is not in the tables."
            )
        torch.manual_seed(0)
        model = model_class(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # gates that start at zero would hide a part of the model
        if parameter.numel() > 1 and parameter.min() == parameter.max():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    for name in ("pad_token_id", "decoder_start_token_id"):
        if getattr(model.config, name, None) is None:
            setattr(model.config, name, SIZES[name])
    return model


def _fields(config_class: Any, own: dict[str, Any]) -> dict[str, Any]:
    found = config_class().to_dict()
    fields = {name: SIZES[name] for name in found if name in SIZES and found[name] is not None}
    for name, sub in getattr(config_class, "sub_configs", {}).items():
        if sub is not None and hasattr(sub, "from_pretrained") and sub is not transformers.AutoConfig:
            fields[name] = _fields(sub, own.get(name, {}))
    return {**fields, **own}


def members(task: str) -> list[tuple[str, str]]:
    """Model types and classes of transformers' mapping for a task type of PEFT's, each class once."""
    names = getattr(modeling_auto, f"MODEL_FOR_{MAPPINGS[task]}_MAPPING_NAMES")
    known = set(dir(transformers))  # asking for a class would import its module
    of_class: dict[str, list[str]] = {}
    for kind, name in names.items():
        if isinstance(name, str) and name in known:
            of_class.setdefault(name, []).append(kind)
    return [(max(kinds, key=lambda kind: _names(kind, name)), name) for name, kinds in of_class.items()]


def _names(model_type: str, class_name: str) -> bool:
    """Whether a class has the name of a model type."""
    return class_name.lower().startswith(model_type.replace("_", "").replace("-", ""))


def runs(model: Any) -> None:
    """Run a model on text alone; raises what the model raises."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs)
