"""The model card of a folder of adapters: `README.md` as the Hub shows it, made from the adapters' configs.

Two blocks between markers, `adapter` and `results`, are written anew; the rest of a card is its author's and stays.
"""

from __future__ import annotations

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

# How transformers calls the model of a task.
MODEL_CLASSES = {
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
# How the Hub calls a task; it has no name for encoder-decoder models.
_PIPELINE_TAGS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_HYPERPARAMETERS = re.compile("num_virtual_tokens|token_dim|encoder_.+|prompt_tuning_init(_seed)?|init_vocab_size")
# What is trained where the network is none of the residual method's.
_METHODS_BY_NETWORK = {"NONE": "prompt tuning", "SUPERPOS": "[SuperPos-Prompt](https://arxiv.org/abs/2406.05279)"}
_CITATION = """\
@inproceedings{razdaibiedina-etal-2023-residual,
    title = "Residual Prompt Tuning: Improving Prompt Tuning with Residual Reparameterization",
    author = "Razdaibiedina, Anastasia and Mao, Yuning and Khabsa, Madian and Lewis, Mike and Hou, Rui and Ba, Jimmy
              and Almahairi, Amjad",
    booktitle = "Findings of the Association for Computational Linguistics: ACL 2023",
    year = "2023",
}"""

Values = Mapping[str, Any]


def update_card(
    folder: str | os.PathLike[str],
    *,
    subfolders: Iterable[str] = (),
    results: Mapping[str, float] | None = None,
    trained_as: Values | None = None,
    tags: Iterable[str] = (),
) -> Path | None:
    """Write a folder's model card, or bring it up to date: metadata, how to load, hyperparameters, results, citation.

    Args:
        folder (`str` or `os.PathLike`): Of an adapter.
        subfolders (`Iterable[str]`): Where further adapters may be, as `save_pretrained` writes those with names.
        results (`Mapping[str, float]`, *optional*): Figures by metric. None leaves those that the card has; an empty
            one removes them.
        trained_as (`Mapping[str, Any]`, *optional*): For an adapter that was made from another one: the config of the
            trained one, as a dictionary.
        tags (`Iterable[str]`): Further tags.

    Returns:
        `pathlib.Path`: The card; None for a folder without adapters, where nothing is written.

    Raises:
        ValueError: If a config or the metadata of an existing card is damaged.
    """
    from huggingface_hub import ModelCard, ModelCardData
    from yaml import YAMLError  # type: ignore[import-untyped]

    path = Path(folder, CARD_NAME)
    files = {subfolder: Path(folder, subfolder, CONFIG_NAME) for subfolder in ("", *subfolders)}
    configs = {subfolder: read_config(file) for subfolder, file in files.items() if file.is_file()}
    if not configs:
        return None
    try:
        card = ModelCard.load(path) if path.is_file() else ModelCard.from_template(ModelCardData())
    except (ValueError, YAMLError) as error:
        raise ValueError(f"`{path}` has damaged metadata ({error}). Mend or delete it.") from error
    trained = [trained_as or {}, *configs.values()]
    is_residual = any(config.get("peft_type") == PEFT_TYPE for config in trained)
    _update_metadata(card.data, next(iter(configs.values())), [*([TAG] if is_residual else []), *tags])
    text = "" if _is_template(card.text) else card.text
    # A card of an export says what was trained; the export's own config does not.
    if is_residual or not _block("adapter").search(text):
        text = _put(text or "# Soft prompt", "adapter", _describe(configs, trained_as))
    if results is not None:
        text = _put(text, "results", _results(results))
    card.text = "\n" + text.strip() + "\n"
    with atomic.new_file(path, overwrite=True) as new:
        card.save(new)
    return path


def read_results(folder: str | os.PathLike[str]) -> dict[str, float] | None:
    """The last evaluation's figures of a Trainer's checkpoint, or None: those at the step that was saved."""
    path = Path(folder, "trainer_state.json")
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        logs = [log for log in state["log_history"] if log["step"] == state["global_step"]]
        figures = {name: value for log in logs for name, value in log.items() if name.startswith("eval_")}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`{path}` is damaged ({error!r}). Delete it, or give the results yourself.") from error
    timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return {name.removeprefix("eval_"): value for name, value in figures.items() if name not in timings} or None


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
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(name, str) or os.path.isdir(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_template(text: str) -> bool:
    """Whether a card is the form that PEFT and transformers write, and nobody has filled in a line."""
    from huggingface_hub import ModelCard, ModelCardData

    form = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    written = re.compile(r"### Framework versions|- PEFT .+|This is the model card of a 🤗 transformers model .+")
    return not any(line not in form and not written.fullmatch(line) for line in text.splitlines())


def _block(name: str) -> re.Pattern[str]:
    return re.compile(rf"<!-- peft-residual: {name} -->.*?<!-- peft-residual: end -->", re.DOTALL)


def _put(text: str, name: str, content: str) -> str:
    block = f"<!-- peft-residual: {name} -->\n\n{content}\n\n<!-- peft-residual: end -->" if content else ""
    if _block(name).search(text):
        return _block(name).sub(lambda _: block, text)
    return f"{text.rstrip()}\n\n{block}"


def _results(results: Mapping[str, float]) -> str:
    if not results:
        return ""
    rows = [f"| {name} | {value:.6g} |" for name, value in results.items()]
    return "\n".join(["## Results", "", "| Metric | Value |", "|---|---|", *rows])


def _describe(configs: Mapping[str, Values], trained_as: Values | None) -> str:
    config = next(iter(configs.values()))
    name = config.get("base_model_name_or_path")
    if _is_hub_id(name):
        base = f"[{name}](https://huggingface.co/{name})"
    else:
        base = "a base model that is not named" if not name else f"a base model in a local folder, `{Path(name).name}`"
    trained = next((c for c in (config, trained_as or {}) if c.get("peft_type") == PEFT_TYPE), None)
    network = "NONE" if trained is None else str(trained.get("encoder_reparameterization_type"))
    method = _METHODS_BY_NETWORK.get(network, "[Residual Prompt Tuning](https://arxiv.org/abs/2305.03937)")
    parts = [
        f"A soft prompt of {config.get('num_virtual_tokens')} virtual tokens for {base}, trained with {method}. The "
        "base model is frozen and is not in here.",
        "## How to load",
        _how_to_load(configs),
        "## Hyperparameters",
        _hyperparameters({"": trained_as} if trained_as else configs),
    ]
    if "Residual" in method:
        parts += ["## Citation", f"```bibtex\n{_CITATION}\n```"]
    return "\n\n".join(parts)


def _how_to_load(configs: Mapping[str, Values]) -> str:
    subfolder, config = next(iter(configs.items()))
    name = config.get("base_model_name_or_path")
    base = name if _is_hub_id(name) else "path/to/the/base/model"
    model_class = MODEL_CLASSES.get(str(config.get("task_type")), "AutoModel")
    revision = f", revision={_literal(config['revision'])}" if config.get("revision") else ""
    where = f", subfolder={_literal(subfolder)}" if subfolder else ""
    head = [
        f"from transformers import {model_class}",
        "",
        f"base = {model_class}.from_pretrained({_literal(base)}{revision})",
        'adapter = "path/or/id"  # a local copy of this repository, or its id on the Hub',
    ]
    if model_class.endswith(("SequenceClassification", "TokenClassification")):
        head[-2] += "  # with as many labels as in training: `num_labels`"
    load = f"model = PeftModel.from_pretrained(base, adapter{where})"
    others = [f"model.load_adapter(adapter, {_literal(key)}, subfolder={_literal(key)})" for key in list(configs)[1:]]
    if all(c.get("peft_type") != PEFT_TYPE for c in configs.values()):
        return "With [PEFT](https://huggingface.co/docs/peft) alone:\n\n" + _code(
            "from peft import PeftModel", *head, load, *others
        )
    plugin = _code(
        "import peft_residual  # adds the method to PEFT", "from peft import PeftModel", *head, load, *others
    )
    fields = ("task_type", "num_virtual_tokens", "num_transformer_submodules", "token_dim", "modules_to_save")
    arguments = ", ".join(f"{field}={_literal(config[field])}" for field in fields if config.get(field) is not None)
    plain = _code(
        "from peft import PeftModel, PromptTuningConfig",
        *head,
        f"config = PromptTuningConfig({arguments})",
        f"model = PeftModel.from_pretrained(base, adapter{where}, config=config)",
    )
    return (
        f"With `peft-residual`, to run it, look inside or train on:\n\n{plugin}\n\nWith PEFT alone, to run it; the "
        f"weights hold the projected prompt, which is all that inference needs:\n\n{plain}\n\n`peft-residual merge` "
        "makes an adapter of it that PEFT loads without the config."
    )


_literal = json.dumps  # of a string, a number or a list of strings: Python's too, in double quotes


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _hyperparameters(configs: Mapping[str, Values]) -> str:
    def row(name: str, values: Iterable[Any]) -> str:
        return f"| {name} | " + " | ".join("" if v is None else str(getattr(v, "value", v)) for v in values) + " |"

    names = dict.fromkeys(n for config in configs.values() for n in config if _HYPERPARAMETERS.fullmatch(n))
    table = {name: [config.get(name) for config in configs.values()] for name in names}
    rows = [row(name, values) for name, values in table.items() if any(value is not None for value in values)]
    return "\n".join([row("", configs), "|---" * (len(configs) + 1) + "|", *rows])
