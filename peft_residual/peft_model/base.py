"""`ResidualPeftModel`: how a batch runs with the prompt in front, in `forward` and in `generate`.

A `PeftModel` that gets a residual adapter becomes an instance of the matching class in `tasks.py` or `causal_lm.py`
(see `register.py`). While the active adapter is of another type, every method calls PEFT's.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import with_cache_name
from .adapters import ResidualAdapters
from .base_model import accepts, has_head, refuse_images_by_position
from .generation import check_assistant, first_token, mask_of_padding, penalizing_text
from .inputs import (
    Inputs,
    check_position_ids,
    extend,
    extend_mask,
    extend_positions,
    padding_first,
    positions_in,
    reorder,
    text_of,
)
from .mixed_batch import BatchPrompt, heads_per_row, mixed_prompt


class ResidualPeftModel(ResidualAdapters):
    """What all task classes share: `P` is `num_virtual_tokens`, `B` rows, `L` input tokens, `H` the width."""

    # Whether `labels` has one entry per token, so that the prompt needs entries too, which the loss ignores.
    has_token_labels = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base model with the prompt in front; arguments as in PEFT's class for the task.

        With `adapter_names`, a list of one name per row, each row gets that adapter's prompt and trained heads:
        residual, merged and plain prompts of any lengths, and none for `"__base__"`.

        Raises:
            ValueError: If `adapter_names` does not name an adapter, or `"__base__"`, for each row.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None and self.active_residual_config() is None:
            return super().forward(*args, **kwargs)
        inputs = dict(kwargs)
        if args:
            inputs.update(zip(inspect.signature(super().forward).parameters, args))
        inputs.pop("task_ids", None)
        inputs = with_cache_name(inputs)
        if self._adapters_disabled:
            return self.base_model(**inputs)
        refuse_images_by_position(self.base_model, inputs)
        with heads_per_row(self, adapter_names):
            return self.prompted_forward(self.batch_prompt(text_of(inputs).shape[0], adapter_names), inputs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the prompt in front of the input; arguments as in transformers' `generate`.

        `adapter_names` as in `forward`.

        Raises:
            ValueError: If there are no `input_ids` and no `bos_token_id` to start with, or if `adapter_names` or
                `assistant_model` do not fit.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None and self.active_residual_config() is None:
            return super().generate(*args, **kwargs)
        signature = inspect.signature(self.base_model.generate)
        signature.bind_partial(*args, **kwargs)  # raises a TypeError if an argument is given twice
        kwargs.update(zip(signature.parameters, args))
        kwargs = with_cache_name(kwargs)
        if "generation_config" in vars(self):  # set on the PeftModel by the user, as Trainer does
            kwargs.setdefault("generation_config", self.generation_config)
        if self._adapters_disabled:
            return self.base_model.generate(**kwargs)
        refuse_images_by_position(self.base_model, kwargs)
        inputs = kwargs.pop("inputs", None)
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is None:
            input_ids = first_token(kwargs, self.base_model)
        check_assistant(kwargs.get("assistant_model"), self.base_model)
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = mask_of_padding(input_ids, kwargs, self.base_model)
        with heads_per_row(self, adapter_names):
            prompt = self.batch_prompt(input_ids.shape[0], adapter_names)
            return self.prompted_generate(prompt, {**kwargs, "input_ids": input_ids})

    def batch_prompt(self, batch_size: int, adapter_names: Sequence[str] | None = None) -> BatchPrompt:
        """The prompts of a batch: the active adapter's for all rows, or one per row by name.

        Raises:
            ValueError: If `adapter_names` does not name an adapter, or `"__base__"`, for each row.
        """
        if adapter_names is not None:
            return mixed_prompt(self, batch_size, adapter_names)
        length = self.peft_config[self.active_adapter].num_virtual_tokens
        return BatchPrompt(self.get_prompt(batch_size=batch_size)[:, :length], is_shared=True)

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Tensor:
        """The projected prompt for every row: `[B, P, H]`, a view of one prompt."""
        if self.active_residual_config() is None:
            return super().get_prompt(batch_size, task_ids=task_ids, max_cache_len=max_cache_len)
        return self.prompt_encoder[self.active_adapter]().expand(batch_size, -1, -1)

    # --- what a task class may change -----------------------------------------------------------------------------

    def prompted_forward(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Run the base model on inputs that do not contain the prompt yet."""
        return self.base_model(**self.prepend_prompt(prompt, inputs))

    def prompted_generate(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Generate from inputs that do not contain the prompt yet."""
        base_model = penalizing_text(self.base_model, inputs["input_ids"], inputs)
        return base_model.generate(**self.prepend_prompt(prompt, inputs))

    def is_decoder_only(self) -> bool:
        """Whether the base model is decoder-only, with any head."""
        model_type = self.base_model_type
        return (
            has_head(model_type, "CAUSAL_LM")
            and not has_head(model_type, "MASKED_LM")
            and not has_head(model_type, "SEQ_TO_SEQ_CAUSAL_LM")
        )

    @property
    def base_model_type(self) -> str | None:
        """The base model's `model_type` in transformers, None if it has none."""
        return getattr(getattr(self.base_model, "config", None), "model_type", None)

    def padding_to_move(self, mask: Tensor) -> Tensor:
        """Which tokens `[B, L]` are moved in front of the prompt: the padding in front of the text."""
        return mask.cumsum(-1) == 0

    def prepend_prompt(self, prompt: BatchPrompt, inputs: Inputs) -> Inputs:
        """Put the prompt in front of the embedded input, and ones in front of its mask.

        Takes `input_ids` `[B, L]` or `inputs_embeds` `[B, L, H]`; returns `inputs_embeds` `[B, P + L, H]`. In a
        decoder-only model, padding in front of a row's text is moved in front of the prompt, and positions do not
        count it, so that each row's output is what it is without the other rows.
        """
        inputs = dict(inputs)
        input_ids, embeds = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
        if embeds is None:
            embeds = self.word_embeddings(input_ids)
        length = prompt.embeds.shape[1]
        mask, position_ids = inputs.get("attention_mask"), inputs.pop("position_ids", None)
        if mask is None and prompt.lengths is not None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        inputs["inputs_embeds"] = torch.cat([prompt.embeds.to(embeds), embeds], dim=1)
        if mask is not None:
            inputs["attention_mask"] = extend_mask(mask, prompt)
        if inputs.get("token_type_ids") is not None and not accepts(self.base_model, "token_type_ids"):
            warnings.warn(f"{self.base_model_type} does not use `token_type_ids`; they are dropped.", stacklevel=2)
            del inputs["token_type_ids"]
        for name in ("token_type_ids", "global_attention_mask"):
            if inputs.get(name) is not None:
                inputs[name] = extend(inputs[name], length, 0, name)
        if self.has_token_labels and inputs.get("labels") is not None:
            inputs["labels"] = extend(inputs["labels"], length, -100, "labels")
        if self.is_decoder_only():
            self._move_padding(prompt, inputs, mask, position_ids)
            return inputs
        # Bidirectional models number positions in their own ways (RoBERTa starts at 2): they compute them.
        if position_ids is not None:
            warnings.warn("`position_ids` are not used with a prompt in front; they are dropped.", stacklevel=2)
        # The prompt must start at the first position, and the text follow it: filler and padding go to the end.
        if mask is not None:
            moved = extend(self.padding_to_move(mask), length, False, "attention_mask")
            if prompt.filler is not None:
                moved[:, :length] = prompt.filler
            if torch.compiler.is_compiling() or moved.any():
                self._reorder(inputs, moved.long().argsort(dim=1, stable=True))
        return inputs

    def _move_padding(
        self, prompt: BatchPrompt, inputs: Inputs, mask: Tensor | None, position_ids: Tensor | None
    ) -> None:
        """Move padding in front of the prompt and set positions that do not count it, in place."""
        if position_ids is not None:
            check_position_ids(position_ids, mask)
            rows = prompt.embeds.shape[0]
            inputs["position_ids"] = extend_positions(position_ids.expand(rows, -1), prompt)
        if mask is not None:
            self._reorder(inputs, padding_first(self.padding_to_move(mask), prompt.embeds.shape[1]))
            if position_ids is None and accepts(self.base_model, "position_ids"):
                inputs["position_ids"] = positions_in(self.base_model, inputs["attention_mask"])

    def _reorder(self, inputs: Inputs, order: Tensor) -> None:
        """Put the columns of all inputs in the given order `[B, P + L]`, in place."""
        names = ["inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "global_attention_mask"]
        for name in names + ["labels"] * self.has_token_labels:
            if inputs.get(name) is not None:
                inputs[name] = reorder(inputs[name], order)

    def without_prompt(self, run: Any, prompt: BatchPrompt, inputs: Inputs, names: tuple[str, ...]) -> Any:
        """Run, and remove the prompt's positions from the named outputs, so that outputs match inputs."""
        return_dict = inputs.get("return_dict")
        if return_dict is None:
            return_dict = getattr(self.base_model.config, "return_dict", True)
        outputs, start = run(prompt, {**inputs, "return_dict": True}), self.text_start(prompt, inputs)
        for name in names:
            output = outputs[name]
            length = output.shape[1] - prompt.embeds.shape[1]
            if isinstance(start, int):
                outputs[name] = output[:, start:].contiguous()
            else:
                index = start.unsqueeze(1) + torch.arange(length, device=output.device)
                outputs[name] = reorder(output, index.clamp(min=0))  # below 0: padding
        return outputs if return_dict else outputs.to_tuple()

    def text_start(self, prompt: BatchPrompt, inputs: Inputs) -> int | Tensor:
        """Where the first column of the input is in the outputs: one number, or `[B]`."""
        length, mask = prompt.embeds.shape[1], inputs.get("attention_mask")
        if self.is_decoder_only() or (prompt.lengths is None and mask is None):
            return length
        moved = 0 if mask is None else self.padding_to_move(mask).sum(dim=1)
        return (length if prompt.lengths is None else prompt.lengths) - moved
