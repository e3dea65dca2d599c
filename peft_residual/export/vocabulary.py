"""After training: prompts as new words of an ordinary checkpoint and tokenizer, for engines that know no prompts."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig
from torch import Tensor

from ..peft_model.mixed_batch import NO_ADAPTER
from ..storage import atomic
from .prompt_tuning import evaluating, get_prompt_tensor, is_close, require_adapter


logger = logging.getLogger(__name__)

PROMPTS_NAME = "soft_prompts.json"
LOGIT_BIAS_NAME = "logit_bias.json"
# Texts that must be tokenized behind a prompt as they are alone. None starts with a space: see `_find_prefixes`.
PROBES = ("the food was great", "a", "42 + 1 = 43", "¿Qué? Così!", "def f(x):\n    return x", "Hello, World.")


@dataclass(frozen=True)
class VocabularyExport:
    """What `save_as_vocabulary` writes.

    Attributes:
        folder (`pathlib.Path`): The checkpoint.
        prefixes (`dict[str, str]`): What to put in front of a text to run it with an adapter's prompt, by the name of
            the adapter; under `"__base__"` what to put in front of a text that is to run without a prompt.
        token_ids (`dict[str, list[int]]`): The ids of each adapter's new tokens, `P` of them.
        size (`int`): Bytes of the weights.
        free (`int`): Free bytes on the disk before they are written.
    """

    folder: Path
    prefixes: dict[str, str]
    token_ids: dict[str, list[int]]
    size: int
    free: int

    @property
    def logit_bias(self) -> dict[str, int]:
        """For requests to engines that do not read `suppress_tokens`: makes the new tokens impossible."""
        return {str(i): -100 for ids in self.token_ids.values() for i in ids}


def save_as_vocabulary(
    model: PeftModel,
    tokenizer: Any,
    out: str | os.PathLike[str],
    *,
    token_format: str = "<task_{i}>",
    adapter_names: Sequence[str] = ("default",),
    overwrite: bool = False,
    dry_run: bool = False,
) -> VocabularyExport:
    """Save base model and prompts as an ordinary checkpoint, whose tokenizer has the prompts' tokens as new words.

    A text behind an adapter's prefix string runs with its prompt, in any engine that runs the base model, with nothing
    enabled. The folder holds, besides checkpoint and tokenizer:

    - `soft_prompts.json`: each adapter's prefix string and ids. Where the tokenizer starts a text with a special token
      (`<s>`), that token belongs behind the prompt: the saved tokenizer adds none, and prefixes end with it.
    - `logit_bias.json`: the new ids with -100, for engines that do not read `suppress_tokens` of
      `generation_config.json` (vLLM, SGLang).

    The output layer is saved apart from the input embeddings, with zeros for the new tokens, so that the logits of all
    other tokens stay what they are. The checkpoint is loaded again and compared with the model before it takes its
    place, which needs memory for a second model.

    Args:
        model ([`~peft.PeftModel`]): With residual or plain prompt tuning adapters, for `CAUSAL_LM` or `SEQ_2_SEQ_LM`;
            unchanged.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The base model's tokenizer; unchanged.
        out (`str` or `os.PathLike`): The folder to write. It appears whole or not at all.
        token_format (`str`): How the new tokens are spelled; `{i}` counts an adapter's tokens, `{name}` is the
            adapter's name, needed where there are several.
        adapter_names (`Sequence[str]`): Which adapters of the model.
        overwrite (`bool`): Whether to replace a folder that exists.
        dry_run (`bool`): Only tell what would be written, and whether the disk has room.

    Returns:
        [`VocabularyExport`]: Prefix strings, new ids, sizes.

    Raises:
        ValueError: If there is no such adapter, the spelling is not unique, or model or tokenizer cannot be right this
            way.
        FileExistsError: If `out` exists and `overwrite` is False, or it holds no checkpoint.
        OSError: If the disk has no room.
    """
    from transformers.utils import CONFIG_NAME

    if not adapter_names:
        raise ValueError("`adapter_names` is empty. Name at least one adapter.")
    prompts = {name: _prompt(model, name) for name in adapter_names}
    base_model = model.get_base_model()
    _check_base(base_model, tokenizer)
    new_tokenizer, token_ids = _add_tokens(tokenizer, prompts, token_format)
    prefixes = _find_prefixes(tokenizer, new_tokenizer, token_ids)
    state, config, generation_config = _extend(base_model, prompts, token_ids)
    _check_shapes(base_model, config, state)
    size = sum({t.untyped_storage().data_ptr(): t.nbytes for t in state.values()}.values())
    export = VocabularyExport(atomic.resolve(out), prefixes, token_ids, size, atomic.check_room(out, size))
    logger.info("%s: %s bytes to write, %s bytes free.", export.folder, f"{size:,}", f"{export.free:,}")
    if dry_run:
        return export
    with atomic.new_folder(export.folder, marker=CONFIG_NAME, overwrite=overwrite) as folder:
        saved = copy.copy(base_model)  # the same weights under another config
        saved.config, saved.generation_config = config, generation_config
        saved.save_pretrained(folder, state_dict=state)
        new_tokenizer.save_pretrained(folder)
        table = {name: {"prefix": prefix, "token_ids": token_ids.get(name, [])} for name, prefix in prefixes.items()}
        for file_name, values in ((PROMPTS_NAME, table), (LOGIT_BIAS_NAME, export.logit_bias)):
            (folder / file_name).write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
        _check_written(folder, base_model, prompts, export, tokenizer)
    return export


def _prompt(model: PeftModel, adapter_name: str) -> Tensor:
    require_adapter(model, adapter_name, PromptTuningConfig)
    config = model.peft_config[adapter_name]
    if config.task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise ValueError(
            f"Adapter {adapter_name!r} has task_type={str(config.task_type)!r}; new words are for models that "
            "generate text (CAUSAL_LM, SEQ_2_SEQ_LM). Use `save_as_prompt_tuning`."
        )
    if config.modules_to_save:
        raise ValueError(
            f"Adapter {adapter_name!r} has trained modules of the model along (modules_to_save="
            f"{config.modules_to_save}); a prefix string cannot choose those. Use `save_as_prompt_tuning`."
        )
    return get_prompt_tensor(model, adapter_name)[: config.num_virtual_tokens]


def _check_base(base_model: Any, tokenizer: Any) -> None:
    name = type(base_model).__name__
    if getattr(base_model, "is_quantized", False) or any(p.device.type == "meta" for p in base_model.parameters()):
        raise ValueError(f"{name} is quantized or offloaded. Load it whole and without quantization to export it.")
    output = base_model.get_output_embeddings()
    if output is None or not isinstance(base_model.get_input_embeddings(), torch.nn.Embedding):
        raise ValueError(
            f"{name} has no pair of an embedding table and an output layer that new words could be added to. Use "
            "`save_as_prompt_tuning`."
        )
    highest, rows = max(max(tokenizer(probe).input_ids) for probe in PROBES), base_model.get_input_embeddings().weight
    if highest >= len(rows):
        raise ValueError(
            f"`tokenizer` gives ids up to {highest}, and {name} has {len(rows)} rows of embeddings. Pass the base "
            "model's own tokenizer."
        )


# --- tokenizer ------------------------------------------------------------------------------------------------------


def _add_tokens(tokenizer: Any, prompts: dict[str, Tensor], token_format: str) -> tuple[Any, dict[str, list[int]]]:
    """A copy of the tokenizer with the new tokens, which starts no text with special tokens; and the new ids."""
    from transformers import AddedToken

    words = {name: [_spell(token_format, i, name) for i in range(len(prompt))] for name, prompt in prompts.items()}
    spelled = [word for name in prompts for word in words[name]]
    known = tokenizer.get_vocab()
    taken = sorted({word for word in spelled if word in known or spelled.count(word) > 1})
    if taken:
        raise ValueError(
            f"`token_format`={token_format!r} spells {taken[:3]}, which the tokenizer has already or which several "
            "tokens would share. Use another spelling, with `{i}` and, for several adapters, `{name}`."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer. Load it with `use_fast=True`.")
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens([AddedToken(word, special=True, normalized=False) for word in spelled], special_tokens=True)
    _drop_leading_tokens(extended)
    return extended, {name: extended.convert_tokens_to_ids(words[name]) for name in prompts}


def _spell(token_format: str, i: int, name: str) -> str:
    try:
        return token_format.format(i=i, name=name)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"`token_format`={token_format!r} may hold `{{i}}` and `{{name}}` only ({error}).") from error


def _drop_leading_tokens(tokenizer: Any) -> None:
    """Take special tokens out of the front of the tokenizer's template; those at the end stay."""
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer
    values = json.loads(backend.to_str())
    steps: list[Any] = [values["post_processor"] or {}]
    while steps:
        step = steps.pop()
        steps.extend(step.get("processors", ()))
        if step.get("type") == "TemplateProcessing":
            for template in (step["single"], step["pair"]):
                while "SpecialToken" in template[0]:
                    del template[0]
    backend.post_processor = Tokenizer.from_str(json.dumps(values)).post_processor


def _find_prefixes(tokenizer: Any, extended: Any, token_ids: dict[str, list[int]]) -> dict[str, str]:
    """Prefix strings by adapter, and for none, behind which a text is tokenized as the tokenizer does it alone."""
    whole, bare = tokenizer(PROBES[0]).input_ids, tokenizer(PROBES[0], add_special_tokens=False).input_ids
    starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    leading = "".join(tokenizer.convert_ids_to_tokens(whole[: starts[0]])) if starts else ""
    # Some tokenizers (Llama 2's) give the first word of a text a space, and a word behind a special token none.
    for separator in ("", " "):
        ends = leading + separator
        prefixes = {name: "".join(extended.convert_ids_to_tokens(ids)) + ends for name, ids in token_ids.items()}
        prefixes[NO_ADAPTER] = ends if leading else ""
        if _reads_alike(tokenizer, extended, prefixes, token_ids):
            return prefixes
    raise ValueError(
        f"{type(tokenizer).__name__} does not tokenize a text behind new tokens as it does alone, so a prefix string "
        "cannot choose a prompt. Use `save_as_prompt_tuning`."
    )


def _reads_alike(tokenizer: Any, extended: Any, prefixes: dict[str, str], token_ids: dict[str, list[int]]) -> bool:
    return all(
        extended(prefix + probe).input_ids == token_ids.get(name, []) + tokenizer(probe).input_ids
        for name, prefix in prefixes.items()
        for probe in PROBES
    )


# --- weights --------------------------------------------------------------------------------------------------------


def _extend(
    base_model: Any, prompts: dict[str, Tensor], token_ids: dict[str, list[int]]
) -> tuple[dict[str, Tensor], Any, Any]:
    """State dict, config and generation config with the new rows."""
    embeddings, output = base_model.get_input_embeddings(), base_model.get_output_embeddings()
    new_ids = [i for ids in token_ids.values() for i in ids]
    rows = max(embeddings.num_embeddings, *(i + 1 for i in new_ids))
    table = embeddings.weight.detach()
    new_table, new_output = _padded(table, rows), _padded(output.weight.detach(), rows)
    # Some modules multiply their rows (Gemma's), in their own precision; the prompt stands behind that.
    scale = torch.as_tensor(getattr(embeddings, "embed_scale", 1.0)).to(table.dtype).item()
    new_table[new_ids] = (torch.cat([prompts[name] for name in token_ids]) / scale).to(table)
    new_output[new_ids] = 0
    state = dict(base_model.state_dict())
    output_names = {f"{name}.weight" for name, module in base_model.named_modules() if module is output}
    for name, tensor in state.items():
        if name in output_names:
            state[name] = new_output
        elif tensor.data_ptr() == table.data_ptr() and tensor.shape == table.shape:
            state[name] = new_table
    if getattr(output, "bias", None) is not None:
        # Where there is a bias, it alone keeps the new tokens from being generated.
        new_bias = _padded(output.bias.detach(), rows)
        new_bias[new_ids] = -1e4
        state.update({name.removesuffix("weight") + "bias": new_bias for name in output_names})
    config, generation_config = copy.deepcopy(base_model.config), copy.deepcopy(base_model.generation_config)
    config.get_text_config().vocab_size = rows
    if set(base_model.get_expanded_tied_weights_keys(all_submodels=True)) <= output_names:
        # Where more than the output layer is tied (T5), loading tells by the weights what is tied and what is not.
        config.tie_word_embeddings = False
    generation_config.suppress_tokens = sorted({*(generation_config.suppress_tokens or ()), *new_ids})
    return state, config, generation_config


def _check_shapes(base_model: Any, config: Any, state: dict[str, Tensor]) -> None:
    """Refuse an architecture in which more than the two tables goes by the size of the vocabulary (BART)."""
    with torch.device("meta"):
        expected = type(base_model)(copy.deepcopy(config)).state_dict()
    for name, tensor in expected.items():
        if name not in state or state[name].shape != tensor.shape:
            found = list(state[name].shape) if name in state else "nothing"
            raise ValueError(
                f"{type(base_model).__name__} cannot be given new words: its `{name}` would need the shape "
                f"{list(tensor.shape)}, and is {found}. Use `save_as_prompt_tuning`."
            )


def _padded(table: Tensor, rows: int) -> Tensor:
    """A copy with zeros for new rows."""
    return torch.cat([table, table.new_zeros(max(rows - len(table), 0), *table.shape[1:])])


# --- what is written is what the model computes ---------------------------------------------------------------------


@torch.no_grad()
def _check_written(
    folder: Path, base_model: Any, prompts: dict[str, Tensor], export: VocabularyExport, tokenizer: Any
) -> None:
    from transformers import AutoTokenizer

    if not _reads_alike(tokenizer, AutoTokenizer.from_pretrained(folder), export.prefixes, export.token_ids):
        raise ValueError(
            f"{type(tokenizer).__name__}, saved and loaded again, does not tokenize a text behind new tokens as it "
            "does alone, so a prefix string cannot choose a prompt. Use `save_as_prompt_tuning`."
        )
    written = type(base_model).from_pretrained(folder, dtype=base_model.dtype).eval()
    for adapter_name, prompt in prompts.items():
        _compare(base_model, written, prompt, export, adapter_name, tokenizer(PROBES[0]).input_ids)


def _compare(
    base_model: Any, written: Any, prompt: Tensor, export: VocabularyExport, adapter_name: str, text: list[int]
) -> None:
    """Compare logits over the vocabulary that there was."""
    embeddings = base_model.get_input_embeddings()
    device, rows = embeddings.weight.device, embeddings.num_embeddings
    start = {}
    if base_model.config.is_encoder_decoder:
        start = {"decoder_input_ids": torch.tensor([[base_model.config.decoder_start_token_id or 0]])}
    with evaluating(base_model):
        embedded = torch.cat([prompt.to(embeddings.weight), embeddings(torch.tensor(text, device=device))])
        live = base_model(inputs_embeds=embedded.unsqueeze(0), **{k: v.to(device) for k, v in start.items()}).logits
    new_ids = [i for ids in export.token_ids.values() for i in ids]
    kept = [i for i in range(rows) if i not in set(new_ids)]
    found = written(input_ids=torch.tensor([export.token_ids[adapter_name] + text]), **start).logits
    if not is_close(found[..., kept], live.cpu()[..., kept]):
        raise ValueError(
            f"{type(base_model).__name__}, saved with new words and loaded again, gives other logits behind them than "
            f"behind the prompt of adapter {adapter_name!r}. Use `save_as_prompt_tuning`."
        )
