"""PEFT's model classes with what prompt learning lacks there, for residual adapters only.

A `PeftModel` that is given a residual adapter becomes an instance of the matching class below (see `registration.py`).
While the active adapter is of any other kind, every method here passes on to PEFT's.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from .config import ResidualPromptTuningConfig
from .distributed import is_spread, whole_state


Inputs = dict[str, Any]


class ResidualPeftModel(PeftModel):
    """What all task classes share: `P` is `num_virtual_tokens`, `B` rows, `L` input tokens, `H` the width."""

    _adapters_disabled: bool  # PEFT's own flag

    # Whether the task passes segment ids on, with zeros for the prompt (as PEFT does), or drops them with a warning.
    keeps_token_type_ids = False
    # Whether `labels` has one entry per token, so that the prompt needs entries too: those that the loss ignores.
    has_token_labels = False

    def active_residual_config(self) -> ResidualPromptTuningConfig | None:
        """The active adapter's config if it is a residual one, else None."""
        name = self.active_adapter
        config = self.peft_config.get(name) if isinstance(name, str) else None
        return config if isinstance(config, ResidualPromptTuningConfig) else None

    # --- forward and generate -------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base model with the prompt in front; arguments as in PEFT's class for the task.

        Raises:
            ValueError: If `adapter_names` is passed: one prompt serves the whole batch.
        """
        config = self.active_residual_config()
        if config is None:
            return super().forward(*args, **kwargs)
        inputs = dict(kwargs)
        if args:
            inputs.update(zip(inspect.signature(super().forward).parameters, args))
        _refuse_adapter_names(inputs)
        inputs.pop("task_ids", None)
        if self._adapters_disabled:
            return self.base_model(**inputs)
        return self.prompted_forward(config, inputs)

    def prompted_forward(self, config: ResidualPromptTuningConfig, inputs: Inputs) -> Any:
        """Run the base model on inputs that do not hold the prompt yet."""
        return self.base_model(**self.prepend_prompt(config, inputs))

    def prepend_prompt(self, config: ResidualPromptTuningConfig, inputs: Inputs) -> Inputs:
        """Put the prompt in front of the embedded input, and ones in front of its mask.

        Takes `input_ids` `[B, L]` or `inputs_embeds` `[B, L, H]`; returns `inputs_embeds` `[B, P + L, H]`. In a
        decoder-only model padding in front of a row's text comes to stand in front of the prompt, and positions do not
        count it, so that each row gets what it gets alone.
        """
        inputs = dict(inputs)
        input_ids, embeds = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
        if embeds is None:
            if input_ids is None:
                raise ValueError("Neither `input_ids` nor `inputs_embeds` was given. Pass one of them.")
            embeds = self.word_embeddings(input_ids)
        length = config.num_virtual_tokens
        prompt = self.get_prompt(batch_size=embeds.shape[0])[:, :length].to(embeds)
        mask, position_ids = inputs.get("attention_mask"), inputs.pop("position_ids", None)
        inputs["inputs_embeds"] = torch.cat([prompt, embeds], dim=1)
        if mask is not None:
            inputs["attention_mask"] = _extend(mask, length, 1, "attention_mask")
        if inputs.get("token_type_ids") is not None:
            if self.keeps_token_type_ids:
                inputs["token_type_ids"] = _extend(inputs["token_type_ids"], length, 0, "token_type_ids")
            else:
                warnings.warn(f"{type(self).__name__} does not use `token_type_ids`; they are dropped.", stacklevel=2)
                del inputs["token_type_ids"]
        if self.has_token_labels and inputs.get("labels") is not None:
            inputs["labels"] = _extend(inputs["labels"], length, -100, "labels")
        if not self.reads_left_to_right():
            # Bidirectional models number positions in ways of their own (RoBERTa starts at 2): leave it to them.
            if position_ids is not None:
                warnings.warn("`position_ids` are not used with a prompt in front; they are dropped.", stacklevel=2)
            return inputs
        if position_ids is not None:
            _refuse_packing(position_ids, mask)
            shifted = position_ids.expand(embeds.shape[0], -1) + length
            own = torch.arange(length, device=shifted.device).expand(embeds.shape[0], -1)
            inputs["position_ids"] = torch.cat([own, shifted], dim=1)
        if mask is not None:
            order = _padding_first(self.padding_to_move(mask), length)
            inputs["inputs_embeds"] = _reorder(inputs["inputs_embeds"], order)
            for name in ("attention_mask", "position_ids", "token_type_ids", "labels" * self.has_token_labels):
                if inputs.get(name) is not None:
                    inputs[name] = _reorder(inputs[name], order)
            if position_ids is None and _accepts_position_ids(self.base_model):
                inputs["position_ids"] = _positions(inputs["attention_mask"])
        return inputs

    def reads_left_to_right(self) -> bool:
        """Whether the base model is decoder-only, whatever head it has."""
        from transformers.models.auto import modeling_auto

        model_type = _model_type(self.base_model)
        return (
            model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            and model_type not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
            and model_type not in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        )

    def padding_to_move(self, mask: Tensor) -> Tensor:
        """Which of the tokens `[B, L]` come to stand in front of the prompt: the padding in front of the text."""
        return mask.cumsum(-1) == 0

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Tensor:
        """The projected prompt for every row: `[B, P, H]`, a view of one prompt."""
        if self.active_residual_config() is None:
            return super().get_prompt(batch_size, task_ids=task_ids, max_cache_len=max_cache_len)
        return self.prompt_encoder[self.active_adapter]().expand(batch_size, -1, -1)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the prompt in front of the input; arguments as in transformers' `generate`.

        Raises:
            ValueError: If `adapter_names` is passed, or no `input_ids`.
        """
        config = self.active_residual_config()
        if config is None:
            return super().generate(*args, **kwargs)
        _refuse_adapter_names(kwargs)
        if args:
            kwargs["inputs"], args = args[0], args[1:]
        if args:
            raise ValueError("`generate` takes one positional argument, the input ids. Name the others.")
        if "generation_config" in vars(self):  # set on the PeftModel by the user, as Trainer does
            kwargs.setdefault("generation_config", self.generation_config)
        if self._adapters_disabled:
            return self.base_model.generate(**kwargs)
        inputs = kwargs.pop("inputs", None)
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is None:
            raise ValueError("`generate` needs `input_ids`. Pass the tokenized text.")
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._mask_of_padding(input_ids, kwargs)
        return self.prompted_generate(config, {**kwargs, "input_ids": input_ids})

    def prompted_generate(self, config: ResidualPromptTuningConfig, inputs: Inputs) -> Any:
        """Generate from inputs that do not hold the prompt yet."""
        return self.base_model.generate(**self.prepend_prompt(config, inputs))

    def _mask_of_padding(self, input_ids: Tensor, inputs: Inputs) -> Tensor:
        # As transformers infers it from `input_ids`, which it cannot do from embeddings.
        pad, eos = (_setting(name, inputs, self.base_model) for name in ("pad_token_id", "eos_token_id"))
        eos_ids = eos if isinstance(eos, (list, tuple)) else [eos]
        if pad is None or pad in eos_ids:
            return torch.ones_like(input_ids)
        return (input_ids != pad).long()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the frozen base model without prompt and with its own heads, in `forward` and in `generate`."""
        if self.active_residual_config() is None:
            with super().disable_adapter():
                yield
            return
        wrappers = [m for m in self.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        gradients = [(p, p.requires_grad) for wrapper in wrappers for p in wrapper.parameters()]
        was_disabled = self._adapters_disabled
        try:
            self._adapters_disabled = True
            for wrapper in wrappers:
                wrapper.enable_adapters(False)
            yield
        finally:
            self._adapters_disabled = was_disabled
            if not was_disabled:
                for wrapper in wrappers:
                    wrapper.enable_adapters(True)
            for parameter, requires_grad in gradients:
                parameter.requires_grad = requires_grad

    # --- adapters -------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make an adapter active: it becomes trainable unless it was loaded for inference; the others freeze."""
        config = self.peft_config.get(adapter_name)
        if isinstance(config, ResidualPromptTuningConfig):
            inference_mode = inference_mode or config.inference_mode
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self.freeze_inactive_prompts()
        if isinstance(config, ResidualPromptTuningConfig):
            self.prompt_encoder[adapter_name].requires_grad_(not inference_mode)

    def freeze_inactive_prompts(self) -> None:
        """Take residual prompts that are not active out of training, so that they do not count as trainable."""
        for name, config in self.peft_config.items():
            if isinstance(config, ResidualPromptTuningConfig) and name != self.active_adapter:
                self.prompt_encoder[name].requires_grad_(False)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Train or freeze the prompt and network of the given residual adapters."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        others = [n for n in names if not isinstance(self.peft_config.get(n), ResidualPromptTuningConfig)]
        if others:
            super().set_requires_grad(others, requires_grad=requires_grad)
        for name in set(names) - set(others):
            self.prompt_encoder[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active, PEFT makes the first of the remaining ones active."""
        was_active = adapter_name == self.active_adapter
        super().delete_adapter(adapter_name)
        if was_active and self.active_residual_config() is not None:
            self.set_adapter(self.active_adapter)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The projected prompt as it is saved: `[P, H]`, float32, on the CPU, without dropout."""
        if not isinstance(self.peft_config[adapter_name], ResidualPromptTuningConfig):
            return super().get_prompt_embedding_to_save(adapter_name)
        encoder = self.prompt_encoder[adapter_name]
        return encoder.project_saved(whole_state(encoder))

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Save adapters as PEFT does, always as safetensors.

        Where FSDP2 or ZeRO-3 spreads the weights over processes and no `state_dict` is given, every process must call
        this; `is_main_process` says which one writes.

        Raises:
            ValueError: If `safe_serialization` is False: a pickled residual adapter would not be read again.
            RuntimeError: If the weights are spread and not every process calls.
        """
        names = selected_adapters or self.peft_config
        residual = [n for n in names if isinstance(self.peft_config.get(n), ResidualPromptTuningConfig)]
        if residual and not safe_serialization:
            raise ValueError(
                f"`safe_serialization=False` would pickle the residual adapter(s) {residual}, and pickles are not "
                "read back. Leave it at True."
            )
        trained = [
            (n, m) for n, m in self.named_modules() if n == "prompt_encoder" or isinstance(m, AuxiliaryTrainingWrapper)
        ]
        if residual and kwargs.get("state_dict") is None and any(is_spread(module) for _, module in trained):
            kwargs["state_dict"] = {k: t for name, module in trained for k, t in whole_state(module, name).items()}
        if selected_adapters is None and kwargs.get("state_dict"):
            selected_adapters = self._adapters_in(kwargs["state_dict"])
        super().save_pretrained(save_directory, safe_serialization, selected_adapters, *args, **kwargs)

    def _adapters_in(self, state_dict: dict[str, Tensor]) -> list[str]:
        """All adapters, without frozen residual ones that are missing: so Trainer saves under ZeRO-3."""
        missing = [
            name
            for name, config in self.peft_config.items()
            if isinstance(config, ResidualPromptTuningConfig)
            and not self.prompt_encoder[name].is_trainable
            and not any(key.startswith(f"prompt_encoder.{name}.") for key in state_dict)
        ]
        if missing:
            warnings.warn(
                f"`state_dict` holds nothing of the frozen adapter(s) {missing}; they are not saved.", stacklevel=3
            )
        return [name for name in self.peft_config if name not in missing]


class ResidualPeftModelForSeq2SeqLM(ResidualPeftModel, PeftModelForSeq2SeqLM):
    """Encoder-decoder models: the prompt stands in front of the encoder's input, the decoder gets none."""

    def prompted_forward(self, config: ResidualPromptTuningConfig, inputs: Inputs) -> Any:
        """Run the base model; with `num_items_in_batch`, the loss is the sum over this many target tokens' share.

        The Trainer passes the number of target tokens of all accumulated batches; T5 and BART take the mean of each
        (transformers issue 47688), which multiplies gradients by the number of batches.
        """
        num_items = inputs.pop("num_items_in_batch", None)
        outputs = super().prompted_forward(config, inputs)
        labels = inputs.get("labels")
        if num_items is None or labels is None:
            return outputs
        share = (labels != -100).sum() / num_items
        if isinstance(outputs, tuple):
            return (outputs[0] * share, *outputs[1:])
        outputs.loss = outputs.loss * share
        return outputs

    def prepend_prompt(self, config: ResidualPromptTuningConfig, inputs: Inputs) -> Inputs:
        """As for all tasks; an encoder's output that was computed before holds no prompt and is computed anew."""
        inputs = dict(inputs)
        if inputs.pop("encoder_outputs", None) is not None:
            warnings.warn("`encoder_outputs` hold no prompt; they are computed anew.", stacklevel=2)
        return super().prepend_prompt(config, inputs)


class ResidualPeftModelForCausalLM(ResidualPeftModel, PeftModelForCausalLM):
    """Causal language models: logits cover prompt and text, and padding changes nothing."""

    has_token_labels = True

    def reads_left_to_right(self) -> bool:
        """All do but those made from bidirectional models; a type that transformers does not know is taken to."""
        from transformers.models.auto import modeling_auto

        return _model_type(self.base_model) not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES

    def prompted_forward(self, config: ResidualPromptTuningConfig, inputs: Inputs) -> Any:
        """Run the base model; a filled cache already holds the prompt."""
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            return self.base_model(**self._behind_cache(config, inputs))
        return super().prompted_forward(config, inputs)

    def _behind_cache(self, config: ResidualPromptTuningConfig, inputs: Inputs) -> Inputs:
        inputs, length = dict(inputs), config.num_virtual_tokens
        position_ids, mask = inputs.pop("position_ids", None), inputs.get("attention_mask")
        if mask is not None:
            extended = _extend(mask, length, 1, "attention_mask")
            inputs["attention_mask"] = _reorder(extended, _padding_first(self.padding_to_move(mask), length))
            if position_ids is None and _accepts_position_ids(self.base_model):
                new = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
                inputs["position_ids"] = _positions(inputs["attention_mask"])[:, -new.shape[1] :]
        if position_ids is not None:
            inputs["position_ids"] = position_ids + length
        return inputs

    def prompted_generate(self, config: ResidualPromptTuningConfig, inputs: Inputs) -> Any:
        """Generate from prompt and text; ids in the result and lengths asked for count the text only."""
        input_ids = inputs["input_ids"]
        if inputs.pop("position_ids", None) is not None:
            warnings.warn("`position_ids` are computed from the mask; those passed are dropped.", stacklevel=2)
        prompted = self.prepend_prompt(config, inputs)
        prompted.pop("position_ids", None)  # transformers computes them from the mask, at every step
        # Padding that all rows share is of no use, and assisted decoding (one row) cannot cope with it.
        unused = int(prompted["attention_mask"].any(dim=0).long().argmax())
        for name in ("attention_mask", "inputs_embeds"):
            prompted[name] = prompted[name][:, unused:]
        _count_new_tokens(prompted, self.base_model, input_ids.shape[1])
        return self.base_model.generate(input_ids=input_ids, **prompted)


class ResidualPeftModelForSequenceClassification(ResidualPeftModel, PeftModelForSequenceClassification):
    """Sequence classification, with a head that is trained along (`modules_to_save`)."""

    keeps_token_type_ids = True

    def prepend_prompt(self, config: ResidualPromptTuningConfig, inputs: Inputs) -> Inputs:
        """As for all tasks; a decoder-only model finds padding in `input_ids`, which are gone then: by a mask."""
        ids, pad = inputs.get("input_ids"), getattr(self.base_model.config, "pad_token_id", None)
        if inputs.get("attention_mask") is None and ids is not None and pad is not None and self.reads_left_to_right():
            inputs = {**inputs, "attention_mask": (ids != pad).long()}
        return super().prepend_prompt(config, inputs)

    def padding_to_move(self, mask: Tensor) -> Tensor:
        """All padding: a decoder-only model answers at the last position, where embeddings show no padding."""
        return mask == 0


class ResidualPeftModelForTokenClassification(ResidualPeftModel, PeftModelForTokenClassification):
    """Token classification: one row of logits per input token, `[B, L, labels]`, none for the prompt."""

    keeps_token_type_ids = True
    has_token_labels = True

    def prompted_forward(self, config: ResidualPromptTuningConfig, inputs: Inputs) -> Any:
        """Run the base model and drop the prompt's logits."""
        return _without_prompt(super().prompted_forward, self.base_model, config, inputs, ("logits",))


class ResidualPeftModelForQuestionAnswering(ResidualPeftModel, PeftModelForQuestionAnswering):
    """Extractive question answering: positions and logits count input tokens, `[B, L]`, not the prompt's."""

    keeps_token_type_ids = True

    def prompted_forward(self, config: ResidualPromptTuningConfig, inputs: Inputs) -> Any:
        """Run the base model with answer positions moved behind the prompt."""
        inputs = dict(inputs)
        for name in ("start_positions", "end_positions"):
            if inputs.get(name) is not None:
                # Below 0 transformers takes the first position; above the length it ignores the row.
                inputs[name] = inputs[name].clamp(min=0) + config.num_virtual_tokens
        names = ("start_logits", "end_logits")
        return _without_prompt(super().prompted_forward, self.base_model, config, inputs, names)


class ResidualPeftModelForFeatureExtraction(ResidualPeftModel, PeftModelForFeatureExtraction):
    """Feature extraction: one feature vector per input token, `[B, L, H]`, none for the prompt."""

    def prompted_forward(self, config: ResidualPromptTuningConfig, inputs: Inputs) -> Any:
        """Run the base model and drop the prompt's features."""
        names = ("last_hidden_state",)
        if getattr(self.base_model.config, "is_encoder_decoder", False):
            names = ("encoder_last_hidden_state",)
        return _without_prompt(super().prompted_forward, self.base_model, config, inputs, names)


RESIDUAL_MODEL_CLASSES: dict[type[PeftModel], type[PeftModel]] = {
    cls.__mro__[2]: cls
    for cls in (
        ResidualPeftModelForSeq2SeqLM,
        ResidualPeftModelForCausalLM,
        ResidualPeftModelForSequenceClassification,
        ResidualPeftModelForTokenClassification,
        ResidualPeftModelForQuestionAnswering,
        ResidualPeftModelForFeatureExtraction,
    )
}


for _peft_class, _class in RESIDUAL_MODEL_CLASSES.items():
    # Transformers' pipelines look for PEFT's classes by name; pickles go by the qualified name, which stays.
    _class.__name__ = _peft_class.__name__


def _refuse_adapter_names(inputs: Inputs) -> None:
    if inputs.pop("adapter_names", None) is not None:
        raise ValueError(
            "`adapter_names` asks for an adapter per row, which residual prompt tuning does not do: one prompt serves "
            "the whole batch. Call `model.set_adapter(name)` and run the rows of each adapter together."
        )


def _extend(tensor: Tensor, length: int, value: int | bool, name: str) -> Tensor:
    """Put `length` columns of `value` in front of a `[B, L]` tensor."""
    if not isinstance(tensor, Tensor) or tensor.ndim != 2:
        got = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
        raise ValueError(f"`{name}` must be a tensor of two dimensions (rows, tokens), got {got}. Pass it like that.")
    return torch.cat([tensor.new_full((tensor.shape[0], length), value), tensor], dim=1)


def _accepts_position_ids(base_model: Any) -> bool:
    base_model = getattr(base_model, "_orig_mod", base_model)  # a compiled model takes anything
    return "position_ids" in inspect.signature(type(base_model).forward).parameters


def _setting(name: str, inputs: Inputs, base_model: Any) -> Any:
    """A generation setting where transformers finds it: argument, `generation_config`, the model's own."""
    configs = (inputs.get("generation_config"), base_model.generation_config)
    values = [inputs.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in values if value is not None), None)


def _positions(mask: Tensor) -> Tensor:
    """Positions that count neither padding in front of the text nor gaps in it; same shape as the mask.

    Padding behind the text goes on counting, as it does without a mask.
    """
    behind_text = mask.flip(-1).cumsum(-1).flip(-1) == 0
    skipped = (mask == 0) & ~behind_text
    return (torch.arange(mask.shape[1], device=mask.device) - skipped.long().cumsum(-1)).clamp(min=0)


def _model_type(base_model: Any) -> str | None:
    return getattr(getattr(base_model, "config", None), "model_type", None)


def _padding_first(moved: Tensor, length: int) -> Tensor:
    """The order `[B, P + L]` that brings what is moved to the front, before the prompt and the rest."""
    return _extend(~moved, length, True, "attention_mask").long().argsort(dim=1, stable=True)


def _reorder(tensor: Tensor, order: Tensor) -> Tensor:
    """Reorder the columns of a `[B, P + L]` or `[B, P + L, H]` tensor, row by row."""
    if tensor.ndim == 3:
        order = order.unsqueeze(-1).expand_as(tensor)
    return tensor.gather(1, order)


def _refuse_packing(position_ids: Tensor, mask: Tensor | None) -> None:
    if torch.compiler.is_compiling():
        return
    restarts = position_ids.diff(dim=-1) <= 0
    if mask is not None:
        restarts = restarts & mask[:, 1:].bool() & mask[:, :-1].bool()
    if restarts.any():
        raise ValueError(
            "`position_ids` restart within a row: several texts are packed into it, and only the first would stand "
            "behind the prompt. Turn packing off (`packing=False`, `padding_free=False`)."
        )


def _count_new_tokens(inputs: Inputs, base_model: Any, text_length: int) -> None:
    """Turn `max_length` and `min_length`, which count the text, into numbers of new tokens.

    Given ids and embeddings, transformers would take the embeddings' length off both.
    """
    settings = copy.deepcopy(inputs.get("generation_config"))
    for length_name, new_name in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length, new_tokens = (_setting(name, inputs, base_model) for name in (length_name, new_name))
        inputs.pop(length_name, None)
        if settings is not None:
            setattr(settings, length_name, None)
        if not length or new_tokens is not None:
            continue
        if length_name == "max_length" and length <= text_length:
            raise ValueError(
                f"`max_length`={length} counts the {text_length} tokens of `input_ids` too and leaves none to "
                "generate. Use a larger one, or `max_new_tokens`."
            )
        if settings is None:
            inputs[new_name] = max(length - text_length, 0)
        else:
            setattr(settings, new_name, max(length - text_length, 0))
    if settings is not None:
        inputs["generation_config"] = settings


def _without_prompt(
    run: Any, base_model: Any, config: ResidualPromptTuningConfig, inputs: Inputs, names: tuple[str, ...]
) -> Any:
    """Run, and cut the prompt's positions off the named outputs, so that outputs and inputs line up."""
    return_dict = inputs.get("return_dict")
    if return_dict is None:
        return_dict = getattr(base_model.config, "return_dict", True)
    outputs = run(config, {**inputs, "return_dict": True})
    for name in names:
        outputs[name] = outputs[name][:, config.num_virtual_tokens :].contiguous()
    return outputs if return_dict else outputs.to_tuple()
