"""New tokens in a tokenizer, one for each virtual token, and the prefix strings that select a prompt with them."""

from __future__ import annotations

import copy
import json
from typing import Any

from torch import Tensor

from ..peft_model.mixed_batch import NO_ADAPTER


# Texts that must be tokenized after a prompt as they are alone. None starts with a space: see `find_prefixes`.
PROBES = ("the food was great", "a", "42 + 1 = 43", "¿Qué? Così!", "def f(x):\n    return x", "Hello, World.")


def add_tokens(tokenizer: Any, prompts: dict[str, Tensor], token_format: str) -> tuple[Any, dict[str, list[int]]]:
    """Copy the tokenizer and add a token for each virtual token. The copy adds no special token in front of a text.

    Returns:
        `tuple`: The copy, and each adapter's new ids.

    Raises:
        ValueError: If the spelling is not unique, or the tokenizer is not a fast one.
    """
    from transformers import AddedToken

    words = {name: [_spell(token_format, i, name) for i in range(len(prompt))] for name, prompt in prompts.items()}
    spelled = [word for name in prompts for word in words[name]]
    known = tokenizer.get_vocab()
    taken = sorted({word for word in spelled if word in known or spelled.count(word) > 1})
    if taken:
        raise ValueError(
            f"`token_format`={token_format!r} spells {taken[:3]}, which the tokenizer already has or which several "
            "tokens would share. Use another spelling, with `{i}` and, for several adapters, `{name}`."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer. Load it with `use_fast=True`.")
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens([AddedToken(word, special=True, normalized=False) for word in spelled], special_tokens=True)
    _drop_leading_tokens(extended)
    return extended, {name: extended.convert_tokens_to_ids(words[name]) for name in prompts}


def _spell(token_format: str, i: int, name: str) -> str:
    try:
        return token_format.format(i=i, name=name)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"`token_format`={token_format!r} may contain only `{{i}}` and `{{name}}` ({error})."
        ) from error


def _drop_leading_tokens(tokenizer: Any) -> None:
    """Remove special tokens from the front of the tokenizer's template. Those at the end stay."""
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


def find_prefixes(tokenizer: Any, extended: Any, token_ids: dict[str, list[int]]) -> dict[str, str]:
    """Find each adapter's prefix string, and the one for no adapter, after which a text is tokenized as it is alone.

    Raises:
        ValueError: If there is none.
    """
    whole, bare = tokenizer(PROBES[0]).input_ids, tokenizer(PROBES[0], add_special_tokens=False).input_ids
    starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    leading = "".join(tokenizer.convert_ids_to_tokens(whole[: starts[0]])) if starts else ""
    # Some tokenizers (Llama 2's) put a space before the first word of a text, but not after a special token.
    for separator in ("", " "):
        ends = leading + separator
        prefixes = {name: "".join(extended.convert_ids_to_tokens(ids)) + ends for name, ids in token_ids.items()}
        prefixes[NO_ADAPTER] = ends if leading else ""
        if tokenizes_alike(tokenizer, extended, prefixes, token_ids):
            return prefixes
    raise ValueError(
        f"{type(tokenizer).__name__} does not tokenize a text after new tokens as it does alone, so a prefix string "
        "cannot select a prompt. Use `save_as_prompt_tuning`."
    )


def tokenizes_alike(tokenizer: Any, extended: Any, prefixes: dict[str, str], token_ids: dict[str, list[int]]) -> bool:
    """Whether each probe after each prefix becomes the adapter's ids and then the probe's own ids."""
    return all(
        extended(prefix + probe).input_ids == token_ids.get(name, []) + tokenizer(probe).input_ids
        for name, prefix in prefixes.items()
        for probe in PROBES
    )
