"""Checks before training: settings with which a soft prompt trains badly, or not at all, without raising an error."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.trainer_callback import TrainerCallback

from ..config import ResidualPromptTuningConfig
from ..encoder import ResidualPromptEncoder
from ..peft_model.base import ResidualPeftModel
from ..peft_model.dropout import active_dropout
from ..peft_model.learning_rate import SMALLEST_LEARNING_RATE, published_learning_rate
from ..storage.sharded import is_sharded
from ..word_embeddings import vocabulary_sample


LARGEST_LEARNING_RATE = 10.0  # the largest in the paper
LARGEST_SCALED_RATE = 1.5  # in units of the embeddings: a token moves by more than its length at each step
LARGEST_MIXING_RATE = 0.1  # where the prompt embedding holds mixing weights of about 1
LARGEST_HEAD_LEARNING_RATE = 0.01
LARGEST_NORM_RATIO = 10.0  # between rows of the projected prompt and of the vocabulary, either way


@dataclass(frozen=True)
class Finding:
    """One result of [`check_training_setup`].

    Args:
        severity (`str`): `"error"`: training cannot give a usable result. `"warning"`: training works, but probably
            worse than it could. `"info"`: something could not be checked.
        subject (`str`): The setting that the finding is about.
        message (`str`): What was found.
        remedy (`str`): What to do about it.
    """

    severity: Literal["error", "warning", "info"]
    subject: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.subject}: {self.message} {self.remedy}"


def check_training_setup(
    model: ResidualPeftModel,
    args: Any,
    processing_class: Any = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    max_source_length: int | None = None,
) -> list[Finding]:
    """Look for settings that make a soft prompt train badly without raising an error. Nothing is changed.

    Checks the learning rates, the dropout of the frozen base model, the norm of the projected prompt compared to the
    vocabulary's, prompt rows and network weights without a gradient, the padding of the tokenizer, evaluation in half
    precision, packing, and whether texts and prompt together fit the model's positions.

    Args:
        model ([`~peft.PeftModel`]): A model with an active residual adapter, not wrapped for distributed training.
        args (`transformers.TrainingArguments`): Also TRL's `SFTConfig`, or any object with some of their fields.
        processing_class (`transformers.PreTrainedTokenizerBase` or `transformers.ProcessorMixin`, *optional*):
            The tokenizer, or a processor with a `tokenizer`. Without one, padding is not checked.
        optimizer (`torch.optim.Optimizer`, *optional*): The optimizer that trains, if it is not built from `args`.
        max_source_length (`int`, *optional*): Number of tokens that texts are truncated to. Defaults to
            `args.max_length`, then to the tokenizer's `model_max_length`.

    Returns:
        `list[Finding]`: Errors first; empty if nothing was found.

    Raises:
        ValueError: If `model` has no active residual adapter.
    """
    if not isinstance(model, ResidualPeftModel) or model.active_residual_config() is None:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no active residual adapter. Pass the model that `get_peft_model` "
            "returned for a ResidualPromptTuningConfig, not a wrapper around it."
        )
    encoder = model.prompt_encoder[model.active_adapter]
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    max_length = max_source_length or getattr(args, "max_length", None)
    findings = [
        *_check_weights(model, encoder),
        *_check_learning_rates(model, encoder, args, optimizer),
        *_check_dropout(model),
        *_check_tokenizer(model, args, tokenizer),
        *_check_arguments(model, args),
        *_check_length(model, tokenizer, max_length),
    ]
    return sorted(findings, key=lambda finding: ("error", "warning", "info").index(finding.severity))


class TrainingSetupCallback(TrainerCallback):
    """Run [`check_training_setup`] once, when the Trainer starts. Warnings are shown, errors stop the training.

    Args:
        max_source_length (`int`, *optional*): Passed to `check_training_setup`.

    **Attributes**:
        - **findings** (`list[Finding]`, *optional*) -- All findings; None until training starts.
    """

    def __init__(self, max_source_length: int | None = None) -> None:
        self.max_source_length = max_source_length
        self.findings: list[Finding] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the setup with the optimizer that the Trainer uses.

        Raises:
            ValueError: If a finding is an error. The message lists all errors.
        """
        if self.findings is not None:
            return
        from accelerate.utils import extract_model_from_parallel

        self.findings = check_training_setup(
            extract_model_from_parallel(kwargs["model"], keep_torch_compile=False),
            args,
            kwargs.get("processing_class"),
            optimizer=kwargs.get("optimizer"),
            max_source_length=self.max_source_length,
        )
        if errors := [str(finding) for finding in self.findings if finding.severity == "error"]:
            raise ValueError("This training setup cannot give a usable result.\n" + "\n".join(errors))
        if state.is_world_process_zero:
            for finding in self.findings:
                warnings.warn(str(finding), stacklevel=2)


def _check_weights(model: ResidualPeftModel, encoder: ResidualPromptEncoder) -> Iterator[Finding]:
    if not encoder.is_trainable:
        message = f"The active adapter {model.active_adapter!r} is frozen: none of its weights would be trained."
        remedy = "Load it with `is_trainable=True`, or activate the adapter to train with `model.set_adapter`."
        yield Finding("error", "model", message, remedy)
    elif is_sharded(encoder) or is_sharded(model.word_embeddings):
        message = "The weights are sharded, so the norm and the gradients of the prompt were not checked."
        yield Finding("info", "model", message, "Call `check_training_setup` before the model is prepared.")
    else:
        yield from _check_gradients(encoder)
        yield from _check_norm(model)


def _check_gradients(encoder: ResidualPromptEncoder) -> Iterator[Finding]:
    # In eval mode, since dropout would hide gradients. A copy, since the live encoder has hooks and state.
    encoder = copy.deepcopy(encoder).cpu().eval()
    parameters = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    prompt = encoder.project()[: encoder.config.num_virtual_tokens]
    # A random direction, since the sum of a LayerNorm's outputs has no gradient.
    direction = torch.randn(prompt.shape, generator=torch.Generator().manual_seed(0), dtype=prompt.dtype)
    found = torch.autograd.grad(prompt, list(parameters.values()), direction, allow_unused=True)
    gradients = dict(zip(parameters, found, strict=True))
    embedding = gradients.get("embedding.weight")
    if embedding is not None and (rows := (embedding == 0).all(dim=1).nonzero().flatten().tolist()):
        message = f"Rows {rows} of the prompt embedding get no gradient: the model's input does not depend on them."
        remedy = "Leave `num_transformer_submodules` unset, and check what a custom network does with these rows."
        yield Finding("warning", "num_virtual_tokens", message, remedy)
    if unused := [name for name, gradient in gradients.items() if gradient is None]:
        message = f"These weights get no gradient: {', '.join(unused)}."
        remedy = "Use them in the network or remove them: distributed training waits for the gradient of every weight."
        yield Finding("warning", "encoder_reparameterization_type", message, remedy)


@torch.no_grad()
def _check_norm(model: ResidualPeftModel) -> Iterator[Finding]:
    # The prompt to save is computed without dropout, so the random state that training starts from does not advance.
    prompt = model.get_prompt_embedding_to_save(model.active_adapter).norm(dim=1).median().item()
    vocabulary = vocabulary_sample(model.word_embeddings).norm(dim=1).median().item()
    if prompt > vocabulary * LARGEST_NORM_RATIO or prompt * LARGEST_NORM_RATIO < vocabulary:
        message = f"The projected prompt's rows have a median norm of {prompt:.3g}, the vocabulary's {vocabulary:.3g}."
        remedy = (
            "Initialize the prompt from the vocabulary (`prompt_tuning_init`). A network that ends in a LayerNorm "
            "gives rows of norm √token_dim: try `encoder_norm_first=True` with `encoder_zero_init=True`."
        )
        yield Finding("warning", "prompt norm", message, remedy)


def _check_learning_rates(
    model: ResidualPeftModel, encoder: ResidualPromptEncoder, args: Any, optimizer: torch.optim.Optimizer | None
) -> Iterator[Finding]:
    default = getattr(args, "learning_rate", None)
    groups = [] if optimizer is None else optimizer.param_groups
    rates = {id(p): group.get("initial_lr", group.get("lr")) for group in groups for p in group["params"]}
    rate = rates.get(id(encoder.embedding.weight), default)
    if rate is not None:
        yield from _check_prompt_rate(encoder.config, rate)
    own = {id(p) for p in encoder.parameters()}
    heads = [rates.get(id(p), default) for p in model.parameters() if p.requires_grad and id(p) not in own]
    head_rate = max((rate for rate in heads if rate is not None), default=0.0)
    if head_rate > LARGEST_HEAD_LEARNING_RATE:
        message = f"The head's learning rate is {head_rate:g}, which suits a prompt but is far too high for a head."
        remedy = "Give the head its own: `optimizer_cls_and_kwargs=(ResidualOptimizerFactory, {...})`."
        yield Finding("warning", "modules_to_save", message, remedy)


def _check_prompt_rate(config: ResidualPromptTuningConfig, rate: float) -> Iterator[Finding]:
    largest = LARGEST_LEARNING_RATE if config.encoder_scale == 1 else LARGEST_SCALED_RATE
    if config.mixes_vocabulary:
        largest = LARGEST_MIXING_RATE
    message, remedy = f"The prompt's learning rate of {rate:g}", published_learning_rate(config)
    if not rate > 0:
        yield Finding("error", "learning_rate", f"{message} trains nothing.", remedy)
    elif rate < SMALLEST_LEARNING_RATE:
        message = f"{message} hardly moves it (the Trainer's default is 5e-5)."
        yield Finding("warning", "learning_rate", message, remedy)
    elif rate > largest:
        yield Finding("warning", "learning_rate", f"{message} is above {largest:g}, the largest useful one.", remedy)


def _check_dropout(model: ResidualPeftModel) -> Iterator[Finding]:
    if active := [value for _, _, value in active_dropout(model.base_model)]:
        message = f"The frozen base model applies dropout in {len(active)} places (up to {max(active):g})."
        remedy = "Call `disable_base_dropout(model)`, or load the base model without dropout."
        yield Finding("warning", "dropout", message, remedy)


def _check_tokenizer(model: ResidualPeftModel, args: Any, tokenizer: Any) -> Iterator[Finding]:
    if getattr(tokenizer, "pad_token_id", 0) is None:
        message = "The tokenizer has no padding token, so texts of different lengths cannot be batched."
        yield Finding("error", "tokenizer", message, "Set one, such as `tokenizer.pad_token = tokenizer.eos_token`.")
    side, is_decoder_only = getattr(tokenizer, "padding_side", None), model.is_decoder_only()
    if is_decoder_only and side == "right" and getattr(args, "predict_with_generate", False):
        message = "Evaluation generates, and after right padding a decoder-only model continues from the padding."
        yield Finding("warning", "padding_side", message, 'Set `tokenizer.padding_side = "left"` for evaluation.')
    elif not is_decoder_only and side == "left":
        message = "Left padding separates the prompt from the text in a model with an encoder."
        yield Finding("warning", "padding_side", message, 'Set `tokenizer.padding_side = "right"`.')


def _check_arguments(model: ResidualPeftModel, args: Any) -> Iterator[Finding]:
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name, False):
            message = "Evaluation outside of training casts the model for good, so later saves are rounded."
            remedy = f"Leave `{name}` off and load the base model in that dtype instead: the prompt stays in float32."
            yield Finding("warning", name, message, remedy)
    # The Trainer looks for the base model's class in `base_model.model`, and shifts no labels if that is its backbone.
    has_row_labels = model.active_peft_config.task_type == "SEQ_CLS" and hasattr(model.base_model, "model")
    if getattr(args, "label_smoothing_factor", 0) and not has_row_labels:
        message = "The Trainer's label smoothing fails on a model with a prompt, or compares labels with wrong logits."
        remedy = "Set `label_smoothing_factor=0`; to smooth labels, give the Trainer a `compute_loss_func`."
        yield Finding("error", "label_smoothing_factor", message, remedy)
    for name in ("packing", "eval_packing", "padding_free"):
        if getattr(args, name, False):
            message = "Several texts would share a row, and only the first of them would have the prompt before it."
            yield Finding("error", name, message, f"Set `{name}=False`.")


def _check_length(model: ResidualPeftModel, tokenizer: Any, max_length: int | None) -> Iterator[Finding]:
    config = getattr(model.base_model.config, "get_text_config", lambda: model.base_model.config)()
    positions = getattr(config, "max_position_embeddings", None)
    length = max_length or getattr(tokenizer, "model_max_length", None)
    prompt = model.prompt_encoder[model.active_adapter].config.num_virtual_tokens
    if not positions or positions < 0 or not length or length > 1e9:
        return  # relative positions, or no known length: `model_max_length` is then about 1e30
    if length + prompt > positions:
        message = f"Texts of up to {length} tokens plus a prompt of {prompt} exceed the model's {positions} positions."
        remedy = f"Truncate texts to {positions - prompt} tokens."
        yield Finding("error" if max_length else "warning", "max_source_length", message, remedy)
