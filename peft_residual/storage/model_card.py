"""The model card of a folder of adapters: `README.md` for the Hub, rendered from their configs with `model_card.md`.

Two blocks between markers, `adapter` and `results`, are rewritten. The rest of a card is its author's and stays.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ..config import PEFT_TYPE
from . import atomic
from .files import read_config


CARD_NAME = "README.md"
TAG = "residual-prompt-tuning"

# transformers' class for the model of a task
MODEL_CLASSES = {
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
# the Hub's name for a task; it has none for encoder-decoder models
_PIPELINE_TAGS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_HYPERPARAMETERS = re.compile("num_virtual_tokens|token_dim|encoder_.+|prompt_tuning_init(_seed|_vocab_size)?")
_METHODS = {
    None: "prompt tuning",
    "NONE": "prompt tuning",
    "SUPERPOS": "[SuperPos-Prompt](https://arxiv.org/abs/2406.05279)",
}
_RESIDUAL = "[Residual Prompt Tuning](https://arxiv.org/abs/2305.03937)"

Values = Mapping[str, Any]


def update_card(
    folder: str | os.PathLike[str],
    *,
    subfolders: Iterable[str] = (),
    results: Mapping[str, float] | None = None,
    trained_as: Values | None = None,
    tags: Iterable[str] = (),
) -> Path | None:
    """Write or update a folder's model card: metadata, how to load, hyperparameters, results, citation.

    Args:
        folder (`str` or `os.PathLike`): An adapter's folder.
        subfolders (`Iterable[str]`): Where further adapters may be, as `save_pretrained` writes named ones.
        results (`Mapping[str, float]`, *optional*): Results by metric. None keeps those that the card has; an empty
            mapping removes them.
        trained_as (`Mapping[str, Any]`, *optional*): For an adapter that was merged or exported: the config of the
            adapter that was trained, as a dictionary.
        tags (`Iterable[str]`): Further tags.

    Returns:
        `pathlib.Path`: The card. None for a folder without adapters, where nothing is written.

    Raises:
        ValueError: If a config or the metadata of an existing card is damaged.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError  # type: ignore[import-untyped]

    path = Path(folder, CARD_NAME)
    files = {subfolder: Path(folder, subfolder, CONFIG_NAME) for subfolder in ("", *subfolders)}
    configs = {subfolder: read_config(file) for subfolder, file in files.items() if file.is_file()}
    if not configs:
        return None
    try:
        card = ModelCard.load(path) if path.is_file() else ModelCard("---\nlibrary_name: peft\n---\n")
    except (ValueError, YAMLError) as error:
        raise ValueError(f"`{path}` has damaged metadata ({error}). Correct or delete it.") from error
    trained = [trained_as or {}, *configs.values()]
    is_residual = any(config.get("peft_type") == PEFT_TYPE for config in trained)
    _update_metadata(card.data, next(iter(configs.values())), [*([TAG] if is_residual else []), *tags])
    text = "" if _is_empty_form(card.text) else card.text
    # The card of an export says how it was trained, its own config does not: without `trained_as` its block stays.
    if is_residual or not _block("adapter").search(text):
        text = _put(text or "# Soft prompt", "adapter", _describe(configs, trained_as))
    if results is not None:
        rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in results.items())
        text = _put(text, "results", f"## Results\n\n| Metric | Value |\n|---|---|\n{rows}" if rows else "")
    card.text = "\n" + text.strip() + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != str(card):
        with atomic.new_file(path, overwrite=True) as new:
            card.save(new)
    return path


def read_results(folder: str | os.PathLike[str]) -> dict[str, float] | None:
    """The evaluation results at the step of a Trainer's checkpoint; None if there are none."""
    path = Path(folder, "trainer_state.json")
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        logs = [log for log in state["log_history"] if log["step"] == state["global_step"]]
        results = {name: value for log in logs for name, value in log.items() if name.startswith("eval_")}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`{path}` is damaged ({error!r}). Delete it, or pass the results yourself.") from error
    timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return {name.removeprefix("eval_"): value for name, value in results.items() if name not in timings} or None


def _update_metadata(data: Any, config: Values, tags: Iterable[str]) -> None:
    name = config.get("base_model_name_or_path")
    data.library_name = "peft"
    found = [tag for tag in data.tags or [] if tag != f"base_model:adapter:{name}"]
    if _is_hub_id(name):
        data.base_model = name
        found.append(f"base_model:adapter:{name}")
    elif data.base_model == name:  # PEFT writes paths too, and the Hub refuses them
        data.base_model = None
    data.tags = list(dict.fromkeys([*found, *tags, "transformers"]))
    data.pipeline_tag = data.pipeline_tag or _PIPELINE_TAGS.get(str(config.get("task_type")))


def _is_hub_id(name: Any) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if not isinstance(name, str) or os.path.isdir(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_empty_form(text: str) -> bool:
    """Whether a card is the form that PEFT and transformers write, without a line that somebody has filled in."""
    written = re.compile(r"### Framework versions|- PEFT .+|This is the model card of a 🤗 transformers model .+")
    return not any(line not in _form_lines() and not written.fullmatch(line) for line in text.splitlines())


@functools.cache
def _form_lines() -> frozenset[str]:
    from huggingface_hub import ModelCard, ModelCardData

    return frozenset(ModelCard.from_template(ModelCardData()).text.splitlines())


def _block(name: str) -> re.Pattern[str]:
    return re.compile(rf"<!-- peft-residual: {name} -->.*?<!-- peft-residual: end -->", re.DOTALL)


def _put(text: str, name: str, content: str) -> str:
    block = f"<!-- peft-residual: {name} -->\n\n{content}\n\n<!-- peft-residual: end -->" if content else ""
    if _block(name).search(text):
        return _block(name).sub(lambda _: block, text)
    return f"{text.rstrip()}\n\n{block}"


@functools.cache
def _template() -> Any:
    from jinja2 import Environment

    environment = Environment(trim_blocks=False, autoescape=False)  # Markdown, not HTML
    environment.filters["literal"] = json.dumps  # a string, number or list of strings, as Python writes it too
    return environment.from_string(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))


def _describe(configs: Mapping[str, Values], trained_as: Values | None) -> str:
    subfolder, config = next(iter(configs.items()))
    base, task_type = config.get("base_model_name_or_path"), str(config.get("task_type"))
    trained = next((c for c in (config, trained_as or {}) if c.get("peft_type") == PEFT_TYPE), {})
    method = _METHODS.get(trained.get("encoder_reparameterization_type"), _RESIDUAL)
    columns = {"": trained_as} if trained_as else configs
    names = dict.fromkeys(name for c in columns.values() for name in c if _HYPERPARAMETERS.fullmatch(name))
    table = {name: [getattr(c.get(name), "value", c.get(name)) for c in columns.values()] for name in names}
    fields = ("task_type", "num_virtual_tokens", "num_transformer_submodules", "token_dim", "modules_to_save")
    arguments = [f"{field}={json.dumps(config[field])}" for field in fields if config.get(field) is not None]
    rendered: str = _template().render(
        config=config,
        base_id=base if _is_hub_id(base) else None,
        base_folder=base and Path(base).name,
        method=method,
        is_residual=method == _RESIDUAL,
        needs_package=any(c.get("peft_type") == PEFT_TYPE for c in configs.values()),
        model_class=MODEL_CLASSES.get(task_type, "AutoModel"),
        needs_labels=task_type in ("SEQ_CLS", "TOKEN_CLS"),
        plain_arguments=", ".join(arguments),
        subfolder=subfolder,
        others=list(configs)[1:],
        columns=list(columns),
        hyperparameters={
            name: ["" if value is None else value for value in values]
            for name, values in table.items()
            if any(value is not None for value in values)
        },
    )
    return rendered.strip()
