"""Saves prompts as new tokens of an ordinary checkpoint, for engines that do not know soft prompts."""

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

from ..compat import dtype_argument, tied_weight_names
from ..storage import atomic
from .prompt_tokens import PROBES, add_tokens, find_prefixes, tokenizes_alike
from .prompt_tuning import get_prompt_tensor
from .shared import evaluating, find_adapter, is_close


logger = logging.getLogger(__name__)

PROMPTS_NAME = "soft_prompts.json"
LOGIT_BIAS_NAME = "logit_bias.json"


@dataclass(frozen=True)
class VocabularyExport:
    """What `save_as_vocabulary` writes.

    Attributes:
        folder (`pathlib.Path`): The checkpoint.
        prefixes (`dict[str, str]`): By adapter, the string to put in front of a text to run it with that adapter's
            prompt; under `"__base__"`, the string for a text without a prompt.
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
        """For requests to engines that do not read `suppress_tokens`: suppresses the new tokens."""
        return {str(i): -100 for ids in self.token_ids.values() for i in ids}


def save_as_vocabulary(
    model: PeftModel,
    tokenizer: Any,
    save_directory: str | os.PathLike[str],
    *,
    token_format: str = "<task_{i}>",
    adapter_names: Sequence[str] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> VocabularyExport:
    """Save base model and prompts as an ordinary checkpoint with one new token for each virtual token.

    A text after an adapter's prefix string runs with that adapter's prompt, in any engine that runs the base model.
    Besides checkpoint and tokenizer, the folder contains:

    - `soft_prompts.json`: each adapter's prefix string and ids. If the tokenizer starts a text with a special token
      (`<s>`), that token belongs after the prompt: the saved tokenizer does not add it, the prefix ends with it.
    - `logit_bias.json`: the new ids with -100, for engines that do not read `suppress_tokens` in
      `generation_config.json` (vLLM, SGLang).

    The output layer is saved separately from the input embeddings, with zeros for the new tokens, so that the logits
    of all other tokens stay the same. Before the folder takes its place, the checkpoint is loaded and compared with
    the model, which needs memory for a second model.

    Args:
        model ([`~peft.PeftModel`]): With residual or plain prompt tuning adapters, for `CAUSAL_LM` or `SEQ_2_SEQ_LM`;
            unchanged.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The base model's tokenizer; unchanged.
        save_directory (`str` or `os.PathLike`): The folder to write, completely or not at all.
        token_format (`str`): How the new tokens are spelled; `{i}` counts an adapter's tokens, `{name}` is the
            adapter's name, needed if there are several.
        adapter_names (`Sequence[str]`, *optional*): The adapters; the active one when None.
        overwrite (`bool`): Whether to replace an existing folder.
        dry_run (`bool`): Only return what would be written, and check the space on the disk.

    Returns:
        [`VocabularyExport`]: Prefix strings, new ids, sizes.

    Raises:
        ValueError: If there is no such adapter, the spelling is not unique, or the outputs would not be the model's.
        FileExistsError: If `save_directory` exists and `overwrite` is False, or it is not a checkpoint.
        OSError: If the disk has too little space.
    """
    from transformers.utils import CONFIG_NAME

    if adapter_names is None:
        adapter_names = [find_adapter(model, None, PromptTuningConfig)[0]]
    if not adapter_names:
        raise ValueError("`adapter_names` is empty. Name at least one adapter.")
    prompts = {name: _prompt(model, name) for name in adapter_names}
    base_model: Any = model.get_base_model()
    _check_base(base_model, tokenizer)
    new_tokenizer, token_ids = add_tokens(tokenizer, prompts, token_format)
    prefixes = find_prefixes(tokenizer, new_tokenizer, token_ids)
    state, config, generation_config = _extend(base_model, prompts, token_ids)
    _check_shapes(base_model, config, state)
    size = sum({t.untyped_storage().data_ptr(): t.nbytes for t in state.values()}.values())
    export = VocabularyExport(
        atomic.resolve(save_directory), prefixes, token_ids, size, atomic.check_room(save_directory, size)
    )
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
    _, config = find_adapter(model, adapter_name, PromptTuningConfig)
    if config.task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise ValueError(
            f"Adapter {adapter_name!r} has task_type={str(config.task_type)!r}; new tokens are for models "
            "that generate text (CAUSAL_LM, SEQ_2_SEQ_LM). Use `save_as_prompt_tuning`."
        )
    if config.modules_to_save:
        raise ValueError(
            f"Adapter {adapter_name!r} has trained heads (modules_to_save={config.modules_to_save}), which a prefix "
            "string cannot select. Use `save_as_prompt_tuning`."
        )
    return get_prompt_tensor(model, adapter_name)[: config.num_virtual_tokens]


def _check_base(base_model: Any, tokenizer: Any) -> None:
    name = type(base_model).__name__
    if getattr(base_model, "is_quantized", False) or any(p.device.type == "meta" for p in base_model.parameters()):
        raise ValueError(
            f"{name} is quantized or offloaded. Load it without quantization and offloading to export it."
        )
    output = base_model.get_output_embeddings()
    if output is None or not isinstance(base_model.get_input_embeddings(), torch.nn.Embedding):
        raise ValueError(
            f"{name} has no embedding table and output layer to which new tokens can be added. Use "
            "`save_as_prompt_tuning`."
        )
    highest, rows = max(max(tokenizer(probe).input_ids) for probe in PROBES), base_model.get_input_embeddings().weight
    if highest >= len(rows):
        raise ValueError(
            f"`tokenizer` gives ids up to {highest}, and {name} has {len(rows)} rows of embeddings. Pass the base "
            "model's own tokenizer."
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
    # Some modules scale their rows (Gemma's), in their own precision. The prompt is the result of that.
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
        # With a bias, this alone keeps the new tokens from being generated.
        new_bias = _padded(output.bias.detach(), rows)
        new_bias[new_ids] = -1e4
        state.update({name.removesuffix("weight") + "bias": new_bias for name in output_names})
    config, generation_config = copy.deepcopy(base_model.config), copy.deepcopy(base_model.generation_config)
    config.get_text_config().vocab_size = rows
    if tied_weight_names(base_model) <= output_names:
        # If more than the output layer is tied (T5), loading finds out from the weights what is tied.
        config.tie_word_embeddings = False
    generation_config.suppress_tokens = sorted({*(generation_config.suppress_tokens or ()), *new_ids})
    return state, config, generation_config


def _check_shapes(base_model: Any, config: Any, state: dict[str, Tensor]) -> None:
    """Refuse an architecture in which more than the two tables depends on the size of the vocabulary (BART)."""
    with torch.device("meta"):
        expected = type(base_model)(copy.deepcopy(config)).state_dict()
    for name, tensor in expected.items():
        if name not in state or state[name].shape != tensor.shape:
            found = list(state[name].shape) if name in state else "nothing"
            raise ValueError(
                f"{type(base_model).__name__} cannot have new tokens: its `{name}` would need the shape "
                f"{list(tensor.shape)}, and has {found}. Use `save_as_prompt_tuning`."
            )


def _padded(table: Tensor, rows: int) -> Tensor:
    """A copy with zeros for new rows."""
    return torch.cat([table, table.new_zeros(max(rows - len(table), 0), *table.shape[1:])])


# --- check what was written ---------------------------------------------------------------------------------------


@torch.no_grad()
def _check_written(
    folder: Path, base_model: Any, prompts: dict[str, Tensor], export: VocabularyExport, tokenizer: Any
) -> None:
    from transformers import AutoTokenizer

    if not tokenizes_alike(tokenizer, AutoTokenizer.from_pretrained(folder), export.prefixes, export.token_ids):
        raise ValueError(
            f"{type(tokenizer).__name__}, saved and loaded again, does not tokenize a text after new tokens as it "
            "does alone, so a prefix string cannot select a prompt. Use `save_as_prompt_tuning`."
        )
    written = type(base_model).from_pretrained(folder, **dtype_argument(base_model.dtype)).eval()
    for adapter_name, prompt in prompts.items():
        _compare(base_model, written, prompt, export, adapter_name, tokenizer(PROBES[0]).input_ids)


def _compare(
    base_model: Any, written: Any, prompt: Tensor, export: VocabularyExport, adapter_name: str, text: list[int]
) -> None:
    """Compare the logits of the original vocabulary."""
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
            f"{type(base_model).__name__}, saved with new tokens and loaded again, computes other logits after them "
            f"than after the prompt of adapter {adapter_name!r}. Use `save_as_prompt_tuning`."
        )
