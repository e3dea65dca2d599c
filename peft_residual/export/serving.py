"""Builds requests to engines that take embeddings in place of text: vLLM and SGLang.

The formats, as vLLM 0.33 and SGLang 0.5.23 decode them:

- vLLM, `POST /v1/completions` of a server started with `--enable-prompt-embeds`: `prompt_embeds` is base64 text, or a
  list of such texts. Each is what `torch.save` writes for one tensor `[tokens, H]` of any floating-point type, read
  with `weights_only=True`. `H` is the model's embedding width. Decoder-only models.
- SGLang, `POST /generate` of a server started with `--disable-radix-cache`: `input_embeds` is a list (tokens) of lists
  (`H`) of JSON numbers, or a list of those; `text` and `input_ids` must be absent.

Both use the numbers in place of the model's embedded text. SGLang's Gemma and Gemma 2 scale them once more.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig
from torch import Tensor

from .prompt_tuning import get_prompt_tensor
from .shared import find_adapter


@torch.no_grad()
def embed_with_prompt(model: PeftModel, tokenizer: Any, text: str, *, adapter_name: str | None = None) -> Tensor:
    """Embed a prompt and the text after it, as the frozen model sees them.

    Args:
        model ([`~peft.PeftModel`]): A causal language model with a residual or plain prompt tuning adapter.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The base model's tokenizer.
        text (`str`): The text, without the prompt; the tokenizer adds its special tokens.
        adapter_name (`str`, *optional*): The adapter; the active one when None.

    Returns:
        `torch.Tensor`: `[P + tokens, H]`, in the dtype of the model's embeddings, on the CPU.

    Raises:
        ValueError: If there is no such prompt, or the model is not a causal language model.
    """
    adapter_name, config = find_adapter(model, adapter_name, PromptTuningConfig)
    if config.task_type != "CAUSAL_LM":
        raise ValueError(
            f"Adapter {adapter_name!r} has task_type={str(config.task_type)!r}; engines take embeddings for causal "
            "language models only (CAUSAL_LM). Use `save_as_vocabulary`."
        )
    base_model: Any = model.get_base_model()
    embeddings = base_model.get_input_embeddings()
    ids = torch.tensor(tokenizer(text).input_ids, dtype=torch.long, device=embeddings.weight.device)
    prompt = get_prompt_tensor(model, adapter_name)
    return torch.cat([prompt.to(embeddings.weight), embeddings(ids)]).cpu()


def vllm_request(
    model: PeftModel, tokenizer: Any, text: str | Sequence[str], /, *, adapter_name: str | None = None, **fields: Any
) -> dict[str, Any]:
    """Build the body of a request to vLLM's `/v1/completions`, with the prompt in front of the text.

    Args:
        model ([`~peft.PeftModel`]): A causal language model with a residual or plain prompt tuning adapter. Only its
            embeddings are used: it does not have to be on a GPU.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The base model's tokenizer.
        text (`str` or `Sequence[str]`): One text, or several, each of which gets an answer.
        adapter_name (`str`, *optional*): The adapter; the active one when None.
        fields: Other fields of the body: `model="name"`, `max_tokens=32`, `temperature=0`.

    Returns:
        `dict[str, Any]`: The body, ready for `json.dumps`.

    Raises:
        ValueError: If there is no such prompt, or the model is not a causal language model.
    """

    def encode(one: str) -> str:
        buffer = io.BytesIO()
        torch.save(embed_with_prompt(model, tokenizer, one, adapter_name=adapter_name), buffer)
        return base64.b64encode(buffer.getvalue()).decode("ascii")

    return {**fields, "prompt_embeds": encode(text) if isinstance(text, str) else [encode(one) for one in text]}


def sglang_request(
    model: PeftModel, tokenizer: Any, text: str | Sequence[str], /, *, adapter_name: str | None = None, **fields: Any
) -> dict[str, Any]:
    """Build the body of a request to SGLang's `/generate`, with the prompt in front of the text.

    Args:
        model ([`~peft.PeftModel`]): A causal language model with a residual or plain prompt tuning adapter. Only its
            embeddings are used: it does not have to be on a GPU.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The base model's tokenizer.
        text (`str` or `Sequence[str]`): One text, or several, each of which gets an answer.
        adapter_name (`str`, *optional*): The adapter; the active one when None.
        fields: Other fields of the body: `sampling_params={"max_new_tokens": 32, "temperature": 0}`.

    Returns:
        `dict[str, Any]`: The body, ready for `json.dumps`.

    Raises:
        ValueError: If there is no such prompt, the model is not a causal language model, or SGLang changes its
            embeddings.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in ("gemma", "gemma2"):
        raise ValueError(
            f"SGLang multiplies the embeddings of a request by the embedding scale of {model_type!r} once more, and "
            "rounds them. Use `save_as_vocabulary`."
        )

    def encode(one: str) -> list[list[float]]:
        return embed_with_prompt(model, tokenizer, one, adapter_name=adapter_name).float().tolist()

    return {**fields, "input_embeds": encode(text) if isinstance(text, str) else [encode(one) for one in text]}
