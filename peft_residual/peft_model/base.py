"""PEFT's model classes with what prompt learning lacks there, for residual adapters only.

A `PeftModel` that is given a residual adapter becomes an instance of the matching class below (see `register.py`).
While the active adapter is of any other kind, every method here passes on to PEFT's.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
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
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..config import ResidualPromptTuningConfig
from ..storage import atomic, model_card
from ..storage.sharded import gathered_state, is_sharded
from .inputs import (
    NO_ADAPTER,
    BatchPrompt,
    extend,
    extend_mask,
    extend_positions,
    padding_first,
    positions_of,
    refuse_packing,
    reorder,
)
from .prompt_cache import PromptCache


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

        With `adapter_names`, a list of one name per row, each row gets that adapter's prompt and trained head:
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
        if self._adapters_disabled:
            return self.base_model(**inputs)
        with self.heads_per_row(adapter_names):
            return self.prompted_forward(self.batch_prompt(_text(inputs).shape[0], adapter_names), inputs)

    def batch_prompt(self, batch_size: int, adapter_names: Sequence[str] | None = None) -> BatchPrompt:
        """The prompts of a batch: the active adapter's for all rows, or one per row by name.

        Raises:
            ValueError: If `adapter_names` does not name an adapter, or `"__base__"`, for each row.
        """
        if adapter_names is None:
            length = self.peft_config[self.active_adapter].num_virtual_tokens
            return BatchPrompt(self.get_prompt(batch_size=batch_size)[:, :length], is_shared=True)
        if isinstance(adapter_names, str) or len(adapter_names) != batch_size:
            raise ValueError(
                f"`adapter_names` must be a list of one name for each of the {batch_size} rows, got "
                f"{adapter_names!r}. Use {NO_ADAPTER!r} for rows without an adapter."
            )
        unknown = sorted({repr(name) for name in adapter_names} - {repr(n) for n in (*self.peft_config, NO_ADAPTER)})
        if unknown:
            raise ValueError(
                f"`adapter_names` has {', '.join(unknown)}, but the adapters are {sorted(self.peft_config)}. Load "
                f"what is missing with `load_adapter`, or use {NO_ADAPTER!r} for rows without an adapter."
            )
        names = list(dict.fromkeys(adapter_names))
        prompts = [self._prompt_by_name(name) for name in names]
        lengths = [prompt.shape[0] for prompt in prompts]
        table = torch.stack([nn.functional.pad(p, (0, 0, max(lengths) - p.shape[0], 0)) for p in prompts])
        rows = torch.tensor([names.index(name) for name in adapter_names], device=table.device)
        row_lengths = torch.tensor(lengths, device=table.device)[rows]
        return BatchPrompt(table[rows], row_lengths if len(set(lengths)) > 1 else None)

    def _prompt_by_name(self, name: str) -> Tensor:
        weight = self.word_embeddings.weight
        if name == NO_ADAPTER:
            return weight.new_zeros(0, weight.shape[1], dtype=torch.float32)
        encoder = self.prompt_encoder[name]
        indices = torch.arange(self.peft_config[name].num_virtual_tokens, device=encoder.embedding.weight.device)
        return encoder(indices).to(weight.device, torch.float32)

    @contextmanager
    def heads_per_row(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        """Let each row go through its own adapter's heads (`modules_to_save`); the base model's where it has none."""
        handles = []
        if adapter_names is not None:
            hook = functools.partial(_run_per_row, adapter_names)
            wrappers = [module for module in self.modules() if isinstance(module, ModulesToSaveWrapper)]
            handles = [wrapper.register_forward_hook(hook, with_kwargs=True) for wrapper in wrappers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def prompted_forward(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Run the base model on inputs that do not hold the prompt yet."""
        return self.base_model(**self.prepend_prompt(prompt, inputs))

    def prepend_prompt(self, prompt: BatchPrompt, inputs: Inputs) -> Inputs:
        """Put the prompt in front of the embedded input, and ones in front of its mask.

        Takes `input_ids` `[B, L]` or `inputs_embeds` `[B, L, H]`; returns `inputs_embeds` `[B, P + L, H]`. In a
        decoder-only model padding in front of a row's text comes to stand in front of the prompt, and positions do not
        count it, so that each row gets what it gets alone.
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
        if inputs.get("token_type_ids") is not None:
            if self.keeps_token_type_ids:
                inputs["token_type_ids"] = extend(inputs["token_type_ids"], length, 0, "token_type_ids")
            else:
                warnings.warn(f"{type(self).__name__} does not use `token_type_ids`; they are dropped.", stacklevel=2)
                del inputs["token_type_ids"]
        if self.has_token_labels and inputs.get("labels") is not None:
            inputs["labels"] = extend(inputs["labels"], length, -100, "labels")
        if not self.is_decoder_only():
            # Bidirectional models number positions in ways of their own (RoBERTa starts at 2): leave it to them.
            if position_ids is not None:
                warnings.warn("`position_ids` are not used with a prompt in front; they are dropped.", stacklevel=2)
            filler = prompt.filler
            if filler is not None:  # the prompt must start at the first position: filler goes to the end
                order = nn.functional.pad(filler.long(), (0, embeds.shape[1])).argsort(dim=1, stable=True)
                self._reorder(inputs, order)
            return inputs
        if position_ids is not None:
            refuse_packing(position_ids, mask)
            inputs["position_ids"] = extend_positions(position_ids.expand(embeds.shape[0], -1), prompt)
        if mask is not None:
            self._reorder(inputs, padding_first(self.padding_to_move(mask), length))
            if position_ids is None and _accepts_position_ids(self.base_model):
                inputs["position_ids"] = positions_of(inputs["attention_mask"])
        return inputs

    def _reorder(self, inputs: Inputs, order: Tensor) -> None:
        """Bring the columns of all inputs into the order `[B, P + L]`, in place."""
        names = ["inputs_embeds", "attention_mask", "position_ids", "token_type_ids"]
        for name in names + ["labels"] * self.has_token_labels:
            if inputs.get(name) is not None:
                inputs[name] = reorder(inputs[name], order)

    def without_prompt(self, run: Any, prompt: BatchPrompt, inputs: Inputs, names: tuple[str, ...]) -> Any:
        """Run, and cut the prompt's positions off the named outputs, so that outputs and inputs line up."""
        return_dict = inputs.get("return_dict")
        if return_dict is None:
            return_dict = getattr(self.base_model.config, "return_dict", True)
        outputs, start = run(prompt, {**inputs, "return_dict": True}), self.text_start(prompt)
        for name in names:
            output = outputs[name]
            length = output.shape[1] - prompt.embeds.shape[1]
            if isinstance(start, int):
                outputs[name] = output[:, start:].contiguous()
            else:
                index = start.unsqueeze(1) + torch.arange(length, device=output.device)
                outputs[name] = reorder(output, index)
        return outputs if return_dict else outputs.to_tuple()

    def text_start(self, prompt: BatchPrompt) -> int | Tensor:
        """Where the input's tokens begin in the outputs: one number, or `[B]`."""
        if prompt.lengths is None or self.is_decoder_only():
            return prompt.embeds.shape[1]
        return prompt.lengths

    def is_decoder_only(self) -> bool:
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

        `adapter_names` as in `forward`.

        Raises:
            ValueError: If no `input_ids` are passed, or `adapter_names` do not fit.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None and self.active_residual_config() is None:
            return super().generate(*args, **kwargs)
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
        with self.heads_per_row(adapter_names):
            prompt = self.batch_prompt(input_ids.shape[0], adapter_names)
            return self.prompted_generate(prompt, {**kwargs, "input_ids": input_ids})

    def prompted_generate(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Generate from inputs that do not hold the prompt yet."""
        return self.base_model.generate(**self.prepend_prompt(prompt, inputs))

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
        return encoder.project_saved(gathered_state(encoder))

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save adapters as PEFT does, always as safetensors; a kill at any moment leaves no half adapter.

        Where FSDP2 or ZeRO-3 spreads the weights over processes and no `state_dict` is given, every process must call
        this; `is_main_process` says which one writes.

        Raises:
            ValueError: If `safe_serialization` is False: a pickled residual adapter would not be read again. Or if
                `save_directory` is a file.
            RuntimeError: If the weights are spread and not every process calls.
        """
        names = selected_adapters or self.peft_config
        residual = [n for n in names if isinstance(self.peft_config.get(n), ResidualPromptTuningConfig)]
        if residual and not safe_serialization:
            raise ValueError(
                f"`safe_serialization=False` would pickle the residual adapter(s) {residual}, and pickles are not "
                "read back. Leave it at True."
            )
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory`={str(save_directory)!r} is a file. Name a folder.")
        trained = [
            (n, m) for n, m in self.named_modules() if n == "prompt_encoder" or isinstance(m, AuxiliaryTrainingWrapper)
        ]
        if residual and kwargs.get("state_dict") is None and any(is_sharded(module) for _, module in trained):
            kwargs["state_dict"] = {k: t for name, module in trained for k, t in gathered_state(module, name).items()}
        if selected_adapters is None and kwargs.get("state_dict"):
            selected_adapters = self._adapters_in(kwargs["state_dict"])
        args = (safe_serialization, selected_adapters, save_embedding_layers, is_main_process)
        if not is_main_process:  # writes nothing, but takes part in gathering
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        with atomic.new_adapters(save_directory) as folder:
            old_card = os.path.join(save_directory, model_card.CARD_NAME)
            if os.path.isfile(old_card):
                shutil.copy(old_card, folder)
            super().save_pretrained(str(folder), *args, **kwargs)
            self.create_or_update_model_card(str(folder))

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write the model card of the adapters in a folder, as [`update_card`] does; results in it are dropped.

        PEFT calls this before it writes adapters, where there is nothing to describe yet, and the Trainer after it has
        written a card of its own. A card whose metadata is damaged is left as it is, with a warning: it is no reason
        to lose what was trained.
        """
        encoders = dict(self.prompt_encoder.named_children())
        subfolders = [name for name in encoders if name != "default"]
        merged_from = getattr(encoders.get("default"), "trained_as", None)
        tags = getattr(self.get_base_model(), "model_tags", None) or ()
        try:
            model_card.update_card(output_dir, subfolders=subfolders, results={}, trained_as=merged_from, tags=tags)
        except ValueError as error:
            warnings.warn(f"The model card was not brought up to date. {error}", stacklevel=3)

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Bring the card up to date once more: transformers' `push_to_hub` replaces it by the Hub's or by a form."""
        self.create_or_update_model_card(str(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

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

    def prompted_forward(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Run the base model; with `num_items_in_batch`, the loss is the sum over this many target tokens' share.

        The Trainer passes the number of target tokens of all accumulated batches; T5 and BART take the mean of each
        (transformers issue 47688), which multiplies gradients by the number of batches.
        """
        num_items = inputs.pop("num_items_in_batch", None)
        outputs = super().prompted_forward(prompt, inputs)
        labels = inputs.get("labels")
        if num_items is None or labels is None:
            return outputs
        share = (labels != -100).sum() / num_items
        if isinstance(outputs, tuple):
            return (outputs[0] * share, *outputs[1:])
        outputs.loss = outputs.loss * share
        return outputs

    def prepend_prompt(self, prompt: BatchPrompt, inputs: Inputs) -> Inputs:
        """As for all tasks; an encoder's output that was computed before holds no prompt and is computed anew."""
        inputs = dict(inputs)
        if inputs.pop("encoder_outputs", None) is not None:
            warnings.warn("`encoder_outputs` hold no prompt; they are computed anew.", stacklevel=2)
        return super().prepend_prompt(prompt, inputs)


class ResidualPeftModelForCausalLM(ResidualPeftModel, PeftModelForCausalLM):
    """Causal language models: logits cover prompt and text, and padding changes nothing."""

    has_token_labels = True
    _prompt_cache: PromptCache | None = None

    def enable_prompt_cache(self) -> None:
        """Compute the active prompt's keys and values once, and start behind them from then on.

        Used without gradients, in eval mode, by `generate` (but not with beams or caches of other kinds) and by a
        `forward` that asks for logits of the text alone (`logits_to_keep`); everything else runs as without. Outputs
        are the same. Any change of prompt or base model is noticed, and the cache computed anew.

        Raises:
            ValueError: If the base model does not read from left to right.
        """
        if not self.is_decoder_only():
            raise ValueError(
                f"Only a causal model has a prompt cache, and {_model_type(self.base_model)!r} reads in both "
                "directions. Use the model without it."
            )
        self._prompt_cache = PromptCache()

    def disable_prompt_cache(self) -> None:
        """Forget the prompt's keys and values, and compute the prompt in every batch again."""
        self._prompt_cache = None

    def start_behind_prompt(self, prompt: BatchPrompt, inputs: Inputs) -> Inputs | None:
        """Inputs `[B, P + L]`, the prompt's keys and values in `past_key_values`; None where that cannot be used."""
        mask, embeds = inputs.get("attention_mask"), inputs.get("inputs_embeds")
        if self._prompt_cache is None or self.training or torch.is_grad_enabled() or not prompt.is_shared:
            return None
        if inputs.get("past_key_values") is not None or inputs.get("position_ids") is not None:
            return None
        embeds = self.word_embeddings(inputs["input_ids"]) if embeds is None else embeds
        cache = self._prompt_cache.for_batch(self.base_model, prompt.embeds[0], embeds.shape[0])
        # Padding between prompt and text would push the prompt out of a sliding window.
        if cache is None or (any(cache.is_sliding) and mask is not None and not mask.all()):
            return None
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return {
            **{name: value for name, value in inputs.items() if name != "input_ids"},
            "inputs_embeds": torch.cat([prompt.embeds.to(embeds), embeds], dim=1),
            "attention_mask": extend_mask(mask, prompt),
            "past_key_values": cache,
        }

    def is_decoder_only(self) -> bool:
        """All do but those made from bidirectional models; a type that transformers does not know is taken to."""
        from transformers.models.auto import modeling_auto

        return _model_type(self.base_model) not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES

    def prepend_prompt(self, prompt: BatchPrompt, inputs: Inputs) -> Inputs:
        """As for all tasks; without a prompt in front of it, nothing predicts a row's first token."""
        inputs = super().prepend_prompt(prompt, inputs)
        if prompt.lengths is not None and inputs.get("labels") is not None:
            is_first = inputs["attention_mask"].cumsum(-1) == 1
            inputs["labels"] = inputs["labels"].masked_fill(is_first & (prompt.lengths == 0).unsqueeze(1), -100)
        return inputs

    def prompted_forward(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Run the base model; a filled cache already holds the prompt."""
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            return self.base_model(**self._behind_cache(prompt, inputs))
        behind = self.start_behind_prompt(prompt, inputs) if _is_about_the_text(inputs) else None
        if behind is None:
            return super().prompted_forward(prompt, inputs)
        length = prompt.embeds.shape[1]
        behind["inputs_embeds"] = behind["inputs_embeds"][:, length:]
        if _accepts_position_ids(self.base_model):
            behind["position_ids"] = positions_of(behind["attention_mask"])[:, length:]
        return self.base_model(**behind)

    def _behind_cache(self, prompt: BatchPrompt, inputs: Inputs) -> Inputs:
        inputs, length = dict(inputs), prompt.embeds.shape[1]
        position_ids, mask = inputs.pop("position_ids", None), inputs.get("attention_mask")
        if mask is not None:
            order = padding_first(self.padding_to_move(mask), length)
            inputs["attention_mask"] = reorder(extend_mask(mask, prompt), order)
            if position_ids is None and _accepts_position_ids(self.base_model):
                inputs["position_ids"] = positions_of(inputs["attention_mask"])[:, -_text(inputs).shape[1] :]
        if position_ids is not None:
            inputs["position_ids"] = extend_positions(position_ids, prompt)[:, length:]
        return inputs

    def prompted_generate(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Generate from prompt and text; ids in the result and lengths asked for count the text only."""
        input_ids = inputs["input_ids"]
        if inputs.pop("position_ids", None) is not None:
            warnings.warn("`position_ids` are computed from the mask; those passed are dropped.", stacklevel=2)
        plain = all(_setting(name, inputs, self.base_model) in (None, default) for name, default in _PLAIN.items())
        with torch.no_grad():  # as transformers generates
            behind = self.start_behind_prompt(prompt, inputs) if plain else None
        if behind is not None:
            _count_new_tokens(behind, self.base_model, input_ids.shape[1])
            return self.base_model.generate(input_ids=input_ids, **behind)
        prompted = self.prepend_prompt(prompt, inputs)
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

    def prepend_prompt(self, prompt: BatchPrompt, inputs: Inputs) -> Inputs:
        """As for all tasks; a decoder-only model finds padding in `input_ids`, which are gone then: by a mask."""
        ids, pad = inputs.get("input_ids"), getattr(self.base_model.config, "pad_token_id", None)
        if inputs.get("attention_mask") is None and ids is not None and pad is not None and self.is_decoder_only():
            inputs = {**inputs, "attention_mask": (ids != pad).long()}
        return super().prepend_prompt(prompt, inputs)

    def padding_to_move(self, mask: Tensor) -> Tensor:
        """All padding: a decoder-only model answers at the last position, where embeddings show no padding."""
        return mask == 0


class ResidualPeftModelForTokenClassification(ResidualPeftModel, PeftModelForTokenClassification):
    """Token classification: one row of logits per input token, `[B, L, labels]`, none for the prompt."""

    keeps_token_type_ids = True
    has_token_labels = True

    def prompted_forward(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Run the base model and drop the prompt's logits."""
        return self.without_prompt(super().prompted_forward, prompt, inputs, ("logits",))


class ResidualPeftModelForQuestionAnswering(ResidualPeftModel, PeftModelForQuestionAnswering):
    """Extractive question answering: positions and logits count input tokens, `[B, L]`, not the prompt's."""

    keeps_token_type_ids = True

    def prompted_forward(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Run the base model with answer positions moved behind the prompt."""
        inputs = dict(inputs)
        for name in ("start_positions", "end_positions"):
            if inputs.get(name) is not None:
                # Below 0 transformers takes the first position; above the length it ignores the row.
                inputs[name] = inputs[name].clamp(min=0) + self.text_start(prompt)
        return self.without_prompt(super().prompted_forward, prompt, inputs, ("start_logits", "end_logits"))


class ResidualPeftModelForFeatureExtraction(ResidualPeftModel, PeftModelForFeatureExtraction):
    """Feature extraction: one feature vector per input token, `[B, L, H]`, none for the prompt."""

    def prompted_forward(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Run the base model and drop the prompt's features."""
        names = ("last_hidden_state",)
        if getattr(self.base_model.config, "is_encoder_decoder", False):
            names = ("encoder_last_hidden_state",)
        return self.without_prompt(super().prompted_forward, prompt, inputs, names)


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


def _text(inputs: Inputs) -> Tensor:
    """The text as it was given: `input_ids` `[B, L]` or `inputs_embeds` `[B, L, H]`."""
    given = inputs.get("input_ids")
    if given is None:
        given = inputs.get("inputs_embeds")
    if given is None:
        raise ValueError("Neither `input_ids` nor `inputs_embeds` was given. Pass one of them.")
    return given


# Settings of `generate` under which it goes on from a cache that it is given, one row for each of the input.
_PLAIN = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "cache_implementation": "dynamic",
    "prompt_lookup_num_tokens": None,
    "assistant_model": None,
    "prefill_chunk_size": None,
}


def _is_about_the_text(inputs: Inputs) -> bool:
    """Whether a forward pass asks for nothing that the prompt's own positions would be part of."""
    kept = inputs.get("logits_to_keep")
    others = ("labels", "output_hidden_states", "output_attentions")
    return (
        isinstance(kept, int)
        and 0 < kept <= _text(inputs).shape[1]
        and not any(inputs.get(name) is not None for name in others)
    )


def _run_per_row(
    adapter_names: Sequence[str], wrapper: ModulesToSaveWrapper, args: tuple[Any, ...], kwargs: Inputs, output: Any
) -> Tensor:
    """Forward hook: what the wrapper returns with each row in its own adapter's module."""
    repeats = len(args[0]) // len(adapter_names)  # beams of a row stand side by side
    names = [name for name in adapter_names for _ in range(repeats)]
    rows: list[Any] = [None] * len(names)
    for name in dict.fromkeys(names):
        own = name in wrapper.modules_to_save
        module = wrapper.modules_to_save[name] if own else wrapper.original_module
        index = [i for i, other in enumerate(names) if other == name]
        for i, row in zip(index, module(args[0][index], *args[1:], **kwargs), strict=True):
            rows[i] = row
    return torch.stack(rows)


def _accepts_position_ids(base_model: Any) -> bool:
    base_model = getattr(base_model, "_orig_mod", base_model)  # a compiled model takes anything
    return "position_ids" in inspect.signature(type(base_model).forward).parameters


def _setting(name: str, inputs: Inputs, base_model: Any) -> Any:
    """A generation setting where transformers finds it: argument, `generation_config`, the model's own."""
    configs = (inputs.get("generation_config"), base_model.generation_config)
    values = [inputs.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in values if value is not None), None)


def _model_type(base_model: Any) -> str | None:
    return getattr(getattr(base_model, "config", None), "model_type", None)


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
