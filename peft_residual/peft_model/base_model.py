"""What is asked of a base model before it gets a prompt: sizes, special tokens, whether it reads embeddings."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ..compat import cache_name, is_wrong_with_a_filled_cache
from ..config import ResidualPromptTuningConfig
from ..storage.sharded import is_sharded


SWITCH = "PEFT_RESIDUAL_CHECK_BASE_MODEL"
TOLERANCE = 0.01  # of the largest output; without another reason than the ids, outputs are equal

_checked: WeakSet[nn.Module] = WeakSet()
_first_positions: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def special_ids(base_model: Any) -> set[int]:
    """Every `*_token_id` in the base model's configuration."""
    values = base_model.config.to_dict() if hasattr(base_model.config, "to_dict") else {}
    ids: set[int] = set()
    for name, value in values.items():
        if name.endswith(("_token_id", "_token_ids")):
            ids.update(i for i in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(i, int))
    return ids


def fill_in_sizes(config: ResidualPromptTuningConfig, base_model: Any) -> None:
    """Fill in the model's sizes, of which PEFT knows only some names (not DistilBERT's, MPT's, Mamba's, ...).

    The width is that of the word embeddings. Numbers of layers and heads are not used by a prompt; 1 if unknown.
    """
    get_embeddings = getattr(base_model, "get_input_embeddings", lambda: None)
    width = getattr(get_embeddings(), "embedding_dim", None)
    if vars(config)["token_dim"] is None and width is not None:
        config.token_dim = width
    model_config = getattr(base_model, "config", None)
    text_config = getattr(model_config, "get_text_config", lambda: model_config)()
    for name, attribute in (("num_layers", "num_hidden_layers"), ("num_attention_heads", "num_attention_heads")):
        if getattr(config, name) is None:
            setattr(config, name, getattr(text_config, attribute, 1))


def accepts(base_model: Any, name: str) -> bool:
    """Whether the base model's `forward` takes an argument of this name."""
    base_model = getattr(base_model, "_orig_mod", base_model)  # a compiled model's signature is (*args, **kwargs)
    return name in inspect.signature(type(base_model).forward).parameters


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and each of its modules back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# torch 2.11 cannot trace the import.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_head(model_type: str | None, head: str) -> bool:
    """Whether transformers has a model of this type with a head, such as `"CAUSAL_LM"`."""
    from transformers.models.auto import modeling_auto

    return model_type in getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES")


def first_position(base_model: Any) -> int:
    """The number of a text's first position: 0, but in models that count from their padding id (Kosmos) the next."""
    if torch.compiler.is_compiling():  # a constant of the graph
        return _find_first_position(base_model)
    if base_model not in _first_positions:
        _first_positions[base_model] = _find_first_position(base_model)
    return _first_positions[base_model]


def _find_first_position(base_model: Any) -> int:
    for module in base_model.modules():
        if hasattr(module, "create_position_ids_from_inputs_embeds"):
            return int(module.padding_idx) + 1
    return 0


def continues_from_cache(base_model: Any) -> bool:
    """Whether the base model computes a text behind a filled cache as behind the prompt that the cache is of.

    ProphetNet reads one token at a time there, and PaliGemma's prompt reads the text.
    """
    if not accepts(base_model, cache_name()) or base_model.config.model_type == "prophetnet":
        return False
    text_config = getattr(base_model.config, "get_text_config", lambda: base_model.config)()
    reads_ahead = getattr(text_config, "use_bidirectional_attention", False)
    return not reads_ahead and not is_wrong_with_a_filled_cache(base_model)


def refuse_images_by_position(base_model: Any, inputs: dict[str, Any]) -> None:
    """Raise a `ValueError` for images or videos in a model that finds their positions with the ids of its input."""
    owners = (base_model, getattr(base_model, "model", None))  # before transformers 4.52, the model itself
    names = [name for name in inputs if name.startswith(("pixel_values", "image_grid", "video_grid"))]
    if any(inputs[name] is not None for name in names) and any(hasattr(owner, "get_rope_index") for owner in owners):
        raise ValueError(
            f"{type(base_model).__name__} computes the positions of images from the ids of its input, and a soft "
            f"prompt has no ids: {', '.join(names)} cannot be used with one. Use text alone, or another model."
        )


def check_base_model(base_model: Any, task_type: str | None) -> None:
    """Check that a prompt can be put in front of a base model, before the adapter is built.

    Raises:
        ValueError: If the model is no encoder-decoder model and the task type needs one, or the other way round. As
            [`check_reads_embeddings`].
    """
    has_encoder = getattr(getattr(base_model, "config", None), "is_encoder_decoder", None)
    wanted = {"CAUSAL_LM": False, "SEQ_2_SEQ_LM": True}.get(task_type or "", has_encoder)
    if has_encoder is not None and wanted != has_encoder:
        is_a, other = ("an", "SEQ_2_SEQ_LM") if has_encoder else ("no", "CAUSAL_LM")
        raise ValueError(
            f"task_type='{task_type}', and {type(base_model).__name__} is {is_a} encoder-decoder model: labels would "
            f"be compared with the wrong tokens. Use task_type='{other}'."
        )
    check_reads_embeddings(base_model, task_type)


def check_reads_embeddings(base_model: Any, task_type: str | None = None) -> None:
    """Check that the base model computes the same from the embeddings of words as from their ids.

    A soft prompt has no ids. A model that reads them for more than the embedding (a second table of embeddings per
    layer, experts by token, a scale that depends on the tokens) would be silently wrong. The check costs two passes
    over five tokens, the first time that a model gets an adapter. It is skipped if the model cannot run on text alone,
    if its weights are sharded, quantized or on the meta device, and if the environment variable
    `PEFT_RESIDUAL_CHECK_BASE_MODEL` is 0.

    Raises:
        ValueError: If the outputs differ: names the model, and how much they differ. If the model has no table of word
            embeddings.
    """
    _check_word_embeddings(base_model)
    if os.environ.get(SWITCH) == "0" or base_model in _checked or not _can_run(base_model):
        return
    embeddings, special = base_model.get_input_embeddings(), special_ids(base_model)
    rows, eos = embeddings.num_embeddings, getattr(getattr(base_model, "config", None), "eos_token_id", None)
    ids = [i for i in range(rows // 2, rows) if i not in special][:4]
    if isinstance(eos, int) and 0 <= eos < rows and eos != embeddings.padding_idx:
        ids.append(eos)  # BART's heads look for it
    words = torch.tensor([ids], device=embeddings.weight.device)
    with torch.no_grad(), in_eval_mode(base_model):
        problem = _difference(_reader(base_model, task_type), words, embeddings(words))
    if problem is not None:
        raise ValueError(
            f"{type(base_model).__name__} reads the ids of its input for more than their embeddings: run on "
            f"`inputs_embeds` of the same words, it {problem}. A soft prompt has no ids, so it cannot be used in "
            f"front of this model. If you know that this does not matter, set the environment variable {SWITCH}=0."
        )
    _checked.add(base_model)


def _check_word_embeddings(base_model: Any) -> None:
    if not hasattr(base_model, "get_input_embeddings"):
        return  # no model of transformers: PEFT searches in its own way
    try:
        found = base_model.get_input_embeddings()
    except NotImplementedError:
        found = None
    weight: Any = getattr(found, "weight", None)
    is_table = isinstance(weight, Tensor)
    if is_table and not weight.is_meta and not is_sharded(found):
        is_table = isinstance(found(torch.zeros(1, 1, dtype=torch.long, device=weight.device)), Tensor)  # not a tuple
    if not is_table:
        raise ValueError(
            f"{type(base_model).__name__} has no table of word embeddings, so that no prompt can be put in front of "
            "its input. Use another base model, or a PEFT method that needs no prompt."
        )


def _can_run(base_model: Any) -> bool:
    embeddings = getattr(base_model, "get_input_embeddings", lambda: None)()
    if not isinstance(embeddings, nn.Embedding) or getattr(base_model, "is_quantized", False):
        return False
    return not is_sharded(base_model) and not any(parameter.is_meta for parameter in base_model.parameters())


def _reader(base_model: Any, task_type: str | None) -> Any:
    """What reads the text: the encoder, if the decoder gets its own ids. Heads make them from those of the text."""
    if not getattr(getattr(base_model, "config", None), "is_encoder_decoder", False):
        return base_model
    has_own_ids = base_model.can_generate() or task_type == "FEATURE_EXTRACTION"
    return base_model.get_encoder() if has_own_ids else base_model


def _difference(base_model: Any, words: Tensor, embeds: Tensor) -> str | None:
    """What is different with embeddings instead of ids; None if nothing is, or if the model needs other inputs too."""
    masks = {"attention_mask": torch.ones_like(words)}
    if accepts(base_model, "global_attention_mask"):
        masks["global_attention_mask"] = torch.zeros_like(words)
    try:
        expected = base_model(input_ids=words, **masks)[0]
    except Exception:
        return None
    try:
        found = base_model(inputs_embeds=embeds, **masks)[0]
    except Exception as error:
        return f"fails ({type(error).__name__}: {error})"
    size, difference = expected.abs().max().item(), (found - expected).abs().max().item()
    if difference > TOLERANCE * size:
        return f"gives outputs that differ by {difference:.2g}, with outputs of up to {size:.2g}"
    return None
