"""A check before training: what would make a soft prompt learn badly, or not at all, without an error."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.trainer_callback import TrainerCallback

from ..encoder import ResidualPromptEncoder
from ..peft_model.base import ResidualPeftModel
from ..peft_model.learning_rate import SMALLEST_LEARNING_RATE, published_learning_rate
from ..storage.sharded import is_sharded
from .dropout import active_dropout


LARGEST_LEARNING_RATE = 10.0  # the paper's largest
LARGEST_MIXING_RATE = 0.1  # of weights for rows of the vocabulary, which are numbers around 1
LARGEST_HEAD_LEARNING_RATE = 0.01
FAR_FROM_VOCABULARY = 10.0  # times the norm of a vocabulary row, or this fraction of it
VOCABULARY_SAMPLE = 4096


@dataclass(frozen=True)
class Finding:
    """What [`check_training_setup`] found.

    Args:
        severity (`str`): `"error"`: training cannot come out right. `"warning"`: it may, but worse than it could.
            `"info"`: what could not be checked.
        subject (`str`): The setting that it is about.
        message (`str`): What was found.
        remedy (`str`): What to do.
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
    tokenizer: Any = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    max_source_length: int | None = None,
) -> list[Finding]:
    """Look for what spoils the training of a soft prompt silently. Nothing is changed.

    Looked at: learning rates; dropout of the frozen base model; the norm of the projected prompt against the
    vocabulary's; rows of the prompt and weights of the network that get no gradient; the tokenizer's padding;
    evaluation in half precision; packing; the text's length plus the prompt against the model's positions.

    Args:
        model ([`~peft.PeftModel`]): With an active residual adapter, not wrapped for several processes.
        args (`transformers.TrainingArguments`): Or TRL's `SFTConfig`, or any object with some of their fields.
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): Without one, padding is not checked.
        optimizer (`torch.optim.Optimizer`, *optional*): What really trains, where that is not built from `args`.
        max_source_length (`int`, *optional*): Tokens that texts are cut to; `args.max_length`, then the tokenizer's
            `model_max_length`, when None.

    Returns:
        `list[Finding]`: Errors first; empty when all is well.

    Raises:
        ValueError: If `model` has no active residual adapter.
    """
    if not isinstance(model, ResidualPeftModel) or model.active_residual_config() is None:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no active residual adapter. Pass what `get_peft_model` returned "
            "for a ResidualPromptTuningConfig, not a wrapper around it."
        )
    findings = [
        *_check_weights(model),
        *_check_learning_rates(model, args, optimizer),
        *_check_dropout(model),
        *_check_tokenizer(model, args, tokenizer),
        *_check_arguments(args),
        *_check_length(model, args, tokenizer, max_source_length),
    ]
    return sorted(findings, key=lambda finding: ("error", "warning", "info").index(finding.severity))


class TrainingSetupCallback(TrainerCallback):
    """Runs [`check_training_setup`] once, when the Trainer starts: warns, and stops before training on an error.

    Args:
        max_source_length (`int`, *optional*): As for `check_training_setup`.

    **Attributes**:
        - **findings** (`list[Finding]`, *optional*) -- What was found; None until training starts.
    """

    def __init__(self, max_source_length: int | None = None) -> None:
        self.max_source_length = max_source_length
        self.findings: list[Finding] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check, with the optimizer that the Trainer really uses.

        Raises:
            ValueError: If a finding is an error; all of them are named.
        """
        if self.findings is not None:
            return
        from accelerate.utils import extract_model_from_parallel

        model = extract_model_from_parallel(kwargs["model"], keep_torch_compile=False)
        self.findings = check_training_setup(
            model,
            args,
            kwargs.get("processing_class"),
            optimizer=kwargs.get("optimizer"),
            max_source_length=self.max_source_length,
        )
        errors = [str(finding) for finding in self.findings if finding.severity == "error"]
        if errors:
            raise ValueError("Training would not come out right.\n" + "\n".join(errors))
        if state.is_world_process_zero:
            for finding in self.findings:
                warnings.warn(str(finding), stacklevel=2)


def _active_encoder(model: ResidualPeftModel) -> ResidualPromptEncoder:
    encoder: ResidualPromptEncoder = model.prompt_encoder[model.active_adapter]
    return encoder


def _check_weights(model: ResidualPeftModel) -> Iterator[Finding]:
    encoder = _active_encoder(model)
    if not encoder.is_trainable:
        yield Finding(
            "error",
            "model",
            f"The active adapter {model.active_adapter!r} is frozen: nothing of it would be trained.",
            "Load it with `is_trainable=True`, or `model.set_adapter` the one to train.",
        )
        return
    if is_sharded(encoder) or is_sharded(model.word_embeddings):
        yield Finding(
            "info",
            "model",
            "The weights are spread over processes, so the prompt's norm and gradients were not checked.",
            "Call `check_training_setup` before the model is prepared.",
        )
        return
    yield from _check_gradients(model, encoder)
    yield from _check_norm(model)


def _check_gradients(model: ResidualPeftModel, encoder: ResidualPromptEncoder) -> Iterator[Finding]:
    # A copy, in eval mode: dropout would hide gradients, and the live one's hooks and state are not to be stirred.
    encoder = copy.deepcopy(encoder).cpu().eval()
    names, parameters = zip(*((name, p) for name, p in encoder.named_parameters() if p.requires_grad), strict=True)
    prompt = encoder.project()[: encoder.config.num_virtual_tokens]
    # Random, since the sum of a LayerNorm's outputs has no gradient.
    direction = torch.randn(prompt.shape, generator=torch.Generator().manual_seed(0), dtype=prompt.dtype)
    gradients = dict(zip(names, torch.autograd.grad(prompt, parameters, direction, allow_unused=True), strict=True))
    raw = gradients.get("embedding.weight")
    if raw is not None:
        rows = (raw == 0).all(dim=1).nonzero().flatten().tolist()
        if rows:
            yield Finding(
                "warning",
                "num_virtual_tokens",
                f"Rows {rows} of the raw prompt get no gradient: nothing that the model sees depends on them.",
                "Leave `num_transformer_submodules` out, and look at what your network does with these rows.",
            )
    unused = [name for name, gradient in gradients.items() if gradient is None]
    if unused:
        yield Finding(
            "warning",
            "encoder_reparameterization_type",
            f"These weights get no gradient: {', '.join(unused)}.",
            "Use them in your network, or remove them: distributed training waits for every gradient.",
        )


@torch.no_grad()
def _check_norm(model: ResidualPeftModel) -> Iterator[Finding]:
    # As it is saved: without dropout, which would also advance the random state of the training to come.
    prompt = model.get_prompt_embedding_to_save(model.active_adapter).norm(dim=1).median().item()
    weight = model.word_embeddings.weight
    ids = torch.arange(0, weight.shape[0], max(1, weight.shape[0] // VOCABULARY_SAMPLE), device=weight.device)
    vocabulary = model.word_embeddings(ids).float().norm(dim=1).median().item()
    if prompt > vocabulary * FAR_FROM_VOCABULARY or prompt * FAR_FROM_VOCABULARY < vocabulary:
        yield Finding(
            "warning",
            "prompt norm",
            f"The projected prompt's rows have a median norm of {prompt:.3g}, the vocabulary's {vocabulary:.3g}.",
            "Start from the vocabulary (`prompt_tuning_init`); a network that ends in a LayerNorm gives rows of norm "
            "√token_dim whatever the vocabulary's: try `encoder_norm_first=True` with `encoder_zero_init=True`.",
        )


def _check_learning_rates(
    model: ResidualPeftModel, args: Any, optimizer: torch.optim.Optimizer | None
) -> Iterator[Finding]:
    rate = getattr(args, "learning_rate", None)
    groups = optimizer.param_groups if optimizer is not None else []
    found = {id(p): group.get("initial_lr", group.get("lr")) for group in groups for p in group["params"]}
    encoder = {id(p) for p in _active_encoder(model).parameters()}
    head = {id(p) for p in model.parameters() if p.requires_grad} - encoder
    prompt_rate = found.get(id(_active_encoder(model).embedding.weight), rate)
    config = _active_encoder(model).config
    largest = LARGEST_MIXING_RATE if config.mixes_vocabulary else LARGEST_LEARNING_RATE
    if prompt_rate is not None and not prompt_rate > 0:
        yield Finding(
            "error",
            "learning_rate",
            f"The prompt's learning rate is {prompt_rate:g}: nothing would be trained.",
            published_learning_rate(config),
        )
    elif prompt_rate is not None and prompt_rate < SMALLEST_LEARNING_RATE:
        yield Finding(
            "warning",
            "learning_rate",
            f"The prompt's learning rate of {prompt_rate:g} hardly moves it (the Trainer's default is 5e-5).",
            published_learning_rate(config),
        )
    elif prompt_rate is not None and prompt_rate > largest:
        yield Finding(
            "warning",
            "learning_rate",
            f"The prompt's learning rate of {prompt_rate:g} is above {largest:g}, the largest that is of use.",
            published_learning_rate(config),
        )
    head_rates = [found.get(identity, rate) for identity in head]
    head_rate = max((r for r in head_rates if r is not None), default=0.0)
    if head_rate > LARGEST_HEAD_LEARNING_RATE:
        yield Finding(
            "warning",
            "modules_to_save",
            f"The head is trained with the learning rate {head_rate:g}, which suits a prompt and ruins a head.",
            "Give it its own: `optimizer_cls_and_kwargs=(ResidualOptimizerFactory, {...})`.",
        )


def _check_dropout(model: ResidualPeftModel) -> Iterator[Finding]:
    active = [value for _, _, value in active_dropout(model)]
    if active:
        yield Finding(
            "warning",
            "dropout",
            f"The frozen base model drops out at {len(active)} places (up to {max(active):g}) in training.",
            "Call `disable_base_dropout(model)`, or load the base model without dropout.",
        )


def _check_tokenizer(model: ResidualPeftModel, args: Any, tokenizer: Any) -> Iterator[Finding]:
    if tokenizer is None:
        return
    if getattr(tokenizer, "pad_token_id", 0) is None:
        yield Finding(
            "error",
            "tokenizer",
            "The tokenizer has no padding token: texts of different lengths cannot share a batch.",
            "Set one, such as `tokenizer.pad_token = tokenizer.eos_token`.",
        )
    side, causal = getattr(tokenizer, "padding_side", None), model.is_decoder_only()
    if causal and side == "right" and getattr(args, "predict_with_generate", False):
        yield Finding(
            "warning",
            "padding_side",
            "Evaluation generates, and with padding on the right a decoder-only model goes on from the padding.",
            'Set `tokenizer.padding_side = "left"` for evaluation.',
        )
    elif not causal and side == "left":
        yield Finding(
            "warning",
            "padding_side",
            "Padding on the left stands between prompt and text in a model with an encoder.",
            'Set `tokenizer.padding_side = "right"`.',
        )


def _check_arguments(args: Any) -> Iterator[Finding]:
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name, False):
            yield Finding(
                "warning",
                name,
                "Evaluation outside of training casts the model for good, the trained prompt and network too; "
                "what is saved afterwards is rounded.",
                f"Leave `{name}` off and load the base model in that type instead: the prompt stays in float32.",
            )
    for name in ("packing", "eval_packing", "padding_free"):
        if getattr(args, name, False):
            yield Finding(
                "error",
                name,
                "Texts that share a row share its one prompt: only the first would stand behind it.",
                f"Set `{name}=False`.",
            )


def _check_length(
    model: ResidualPeftModel, args: Any, tokenizer: Any, max_source_length: int | None
) -> Iterator[Finding]:
    config = getattr(model.base_model.config, "get_text_config", lambda: model.base_model.config)()
    positions = getattr(config, "max_position_embeddings", None)
    given = max_source_length or getattr(args, "max_length", None)
    length = given or getattr(tokenizer, "model_max_length", None)
    prompt = _active_encoder(model).config.num_virtual_tokens
    if not positions or positions < 0 or not length or length > 1e9 or length + prompt <= positions:
        return  # relative positions, or nothing said about lengths (transformers then has 1e30), or room for all
    yield Finding(
        "error" if given else "warning",
        "max_source_length",
        f"Texts of up to {length} tokens and {prompt} of the prompt do not fit the model's {positions} positions.",
        f"Cut texts to {positions - prompt} tokens.",
    )
