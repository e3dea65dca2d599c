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
LARGEST = 9_000_000  # parameters: a larger model has a size that is not in the tables

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
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "head_dim": 8}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "diffllama", "dots3_note"), _PAIRS),
    **dict.fromkeys(("dots3_note_text", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu", "nemotron"), _PAIRS),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), _FOUR_LAYERS),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text", "recurrent_gemma"), _FOUR_LAYERS),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _ROPE),
    **dict.fromkeys(("lfm2_moe", "lfm3"), _CONV),
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text", "paddleocr_vl_text", "glm4v_text", "glm_ocr_text"), _SECTIONS
    ),
    "bailing_hybrid": {**_FOUR_LAYERS, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "deepseek_v2": {**_PAIRS, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
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


# Groups of models: PEFT's task type and transformers' mapping.
GROUPS = {
    "causal": ("CAUSAL_LM", "MODEL_FOR_CAUSAL_LM"),
    "image-text": ("CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT"),
    "encoder-decoder": ("SEQ_2_SEQ_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM"),
    "sequence": ("SEQ_CLS", "MODEL_FOR_SEQUENCE_CLASSIFICATION"),
    "token": ("TOKEN_CLS", "MODEL_FOR_TOKEN_CLASSIFICATION"),
    "question": ("QUESTION_ANS", "MODEL_FOR_QUESTION_ANSWERING"),
    "base": ("FEATURE_EXTRACTION", "MODEL"),
}
# Model types that are not built: they have parts for images, sounds or layouts with sizes of their own, need a package
# or inputs besides text, or their default configuration is not valid at these sizes.
NOT_BUILT = {
    group: frozenset(kinds.split())
    for group, kinds in {
        "causal": "bailing_hybrid blt cohere_compass_text dbrx gemma3n gemma4_assistant "
        "gemma4_unified_assistant kimi_linear longcat_flash musicgen musicgen_melody qwen4_exp "
        "reformer roc_bert xlstm zamba zamba2",
        "image-text": "blip blip-2 chameleon cohere_compass cosmos3_edge deepseek_ocr2 diffusion_gemma dots3_note "
        "emu3 ernie4_5_vl_moe fast_vlm florence2 glm46v glm4v glm4v_moe glm5_next glm_ocr "
        "granite4_vision granite_docling hunyuan_vl idefics inkling2 instructblip instructblipvideo "
        "janus kosmos-2 llama4 mistral4 mistral_large4 molmo2 muse_glimmer muse_spark nemotron_h_omni "
        "perception_lm pi0 pix2struct pp_formulanet qwen2_5_omni_thinker qwen3_omni_moe_thinker "
        "qwen4_exp step3p7 udop vision-encoder-decoder",
        "encoder-decoder": "granite_speech granite_speech_plus nemo_speechlm vibevoice_asr voxtral_realtime",
        "sequence": "bart bigbird_pegasus cohere_compass_text esm esmc layoutlmv2 layoutlmv3 lilt luke mbart "
        "mistral4 mt5 mvp perceiver plbart reformer roc_bert t5 umt5 zamba zamba2",
        "token": "bros esm esmc layoutlmv2 layoutlmv3 lilt luke mistral4 roc_bert",
        "question": "layoutlmv2 layoutlmv3 lilt longformer luke lxmert reformer roc_bert",
        "base": "bailing_hybrid blip blip-2 blt bros chameleon cohere_compass cohere_compass_text "
        "cosmos3_edge dbrx deepseek_ocr2 diffusion_gemma dots3_note emu3 ernie4_5_vl_moe esm esmc "
        "fast_vlm florence2 gemma3n glm46v glm4v glm4v_moe glm5_next glm_ocr granite4_vision "
        "granite_docling granite_speech granite_speech_plus hunyuan_vl idefics inkling2 instructblip "
        "instructblipvideo janus kimi_linear kosmos-2 layoutlmv2 layoutlmv3 lilt llama4 longcat_flash "
        "luke lxmert mistral4 mistral_large4 molmo2 muse_glimmer muse_spark musicgen musicgen_melody "
        "nemo_speechlm perceiver perception_lm pi0 qwen2_5_omni_thinker qwen3_omni_moe_thinker "
        "qwen4_exp qwen4_exp_text reformer roc_bert seamless_m4t seamless_m4t_v2 step3p7 udop "
        "vibevoice_asr voxtral_realtime whisper xlstm zamba zamba2",
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
        config_class = model_class.config_class
        config = config_class(**_fields(config_class(), OWN.get(model_type, {})))
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
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, name, None) is None:
                setattr(config, name, SIZES[name])
    return model


def _fields(default: Any, own: dict[str, Any]) -> dict[str, Any]:
    found = default.to_dict()
    fields = {name: SIZES[name] for name in found if name in SIZES and found[name] is not None}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, transformers.PretrainedConfig):
            kind = {"model_type": part.model_type} if part.model_type else {}
            fields[name] = {**_fields(part, {**OWN.get(part.model_type, {}), **own.get(name, {})}), **kind}
    return {**fields, **{name: value for name, value in own.items() if name not in fields or name in SIZES}}


def task_type(group: str, model: Any) -> str:
    """PEFT's task type of a model. Some models of a mapping for encoder-decoder models have none, or the other way."""
    task = GROUPS[group][0]
    return {True: "SEQ_2_SEQ_LM", False: "CAUSAL_LM"}[model.config.is_encoder_decoder] if task.endswith("LM") else task


def members(group: str) -> list[tuple[str, str]]:
    """Model types and classes of a group, each class once, and in one group. Base models are those of the others."""
    names = _names_of(group)
    others = [_names_of(other) for other in GROUPS if other != group]
    if group == "base":
        names = {kind: name for kind, name in names.items() if any(kind in other for other in others)}
    if group == "image-text":
        names = {kind: name for kind, name in names.items() if name not in _names_of("causal").values()}
    known = set(dir(transformers))  # asking for a class would import its module
    of_class: dict[str, list[str]] = {}
    for kind, name in names.items():
        if isinstance(name, str) and name in known:
            of_class.setdefault(name, []).append(kind)
    return [(max(kinds, key=lambda kind: _names(kind, name)), name) for name, kinds in of_class.items()]


def _names_of(group: str) -> dict[str, Any]:
    return dict(getattr(modeling_auto, f"{GROUPS[group][1]}_MAPPING_NAMES"))


def _names(model_type: str, class_name: str) -> bool:
    """Whether a class has the name of a model type."""
    return class_name.lower().startswith(model_type.replace("_", "").replace("-", ""))


def runs(model: Any) -> None:
    """Run a model on text alone; raises what the model raises."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs)
