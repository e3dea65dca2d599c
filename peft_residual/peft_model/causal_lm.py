"""PEFT's class for causal language models, and its cache of the prompt's keys and values."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from torch import Tensor

from ..compat import cache_name, generates_from_a_filled_cache, has_sliding_layers
from .base import ResidualPeftModel
from .base_model import accepts, continues_from_cache, has_head
from .generation import (
    can_continue_from_cache,
    check_direction,
    count_new_tokens,
    penalizing_text,
    refuse_assistance,
    setting,
    taking_embeds,
)
from .inputs import (
    Inputs,
    extend_mask,
    extend_positions,
    padding_first,
    positions_in,
    reorder,
    text_of,
)
from .label_logits import at_labels, check_label_logits
from .mixed_batch import BatchPrompt
from .prompt_cache import PromptCache
from .shared_prompt import can_share, pays_to_share, shared_forward


class PeftModelForCausalLM(ResidualPeftModel, peft.PeftModelForCausalLM):
    """Causal language models: logits cover prompt and text, and padding changes nothing."""

    has_token_labels = True
    _prompt_cache: PromptCache | None = None
    _share_prompt: bool | None = None
    _logits_at_labels: bool = False

    def enable_prompt_cache(self) -> None:
        """Compute the active prompt's keys and values once, and reuse them for every batch.

        They are used without gradients, in eval mode, by `generate` (but not with beams or other types of cache) and
        by a `forward` that asks only for logits of the text (`logits_to_keep`). Outputs are the same. When the prompt
        or the base model changes, they are recomputed.

        Raises:
            ValueError: If the base model is bidirectional.
        """
        if not self.is_decoder_only():
            raise ValueError(
                f"Only a causal model can cache its prompt, and {self.base_model_type!r} is bidirectional. Use the "
                "model without the cache."
            )
        if not generates_from_a_filled_cache():
            warnings.warn(
                "`generate` does not use the prompt cache: this transformers (5.0 to 5.2) ignores the length of a "
                "filled cache. Outputs are the same. Install transformers>=5.3 to use it.",
                stacklevel=2,
            )
        self._prompt_cache = PromptCache()

    def disable_prompt_cache(self) -> None:
        """Drop the prompt's keys and values; every batch computes them again."""
        self._prompt_cache = None

    def share_prompt(self, enabled: bool | None = None) -> None:
        """Set whether `forward` computes the prompt once per batch, and not once per row.

        Outputs and gradients are the same up to rounding, and a training step with a long prompt is two to three times
        faster. If it would not be exact (dropout in the base model, reentrant gradient checkpointing, sliding windows,
        state spaces, sharded or compiled models, several adapters in a batch), each row computes the prompt.

        Args:
            enabled (`bool`, *optional*): None (the default) shares if it was measured to be faster: on a CPU, with at
                least 20 virtual tokens, if the model then runs on at least 15 % fewer tokens. True always shares,
                False never.
        """
        self._share_prompt = enabled

    def compute_logits_at_labels(self, enabled: bool = True) -> None:
        """Set whether `forward` with `labels` computes logits only at the positions that predict a label.

        Loss and gradients are the same. `outputs.logits` is then `[B, K, V]`: one column for each of the `K` positions
        at which any row of the batch has a label, in their order. Leave it off if something reads the logits of a
        batch with labels by position, such as `compute_metrics` or TRL's token accuracy.

        Args:
            enabled (`bool`): False gives PEFT's shape again, `[B, P + L, V]`.

        Raises:
            ValueError: If the base model cannot leave out logits, or computes its loss in its own way.
        """
        if enabled:
            check_label_logits(self.base_model)
        self._logits_at_labels = enabled

    def continue_from_prompt(self, prompt: BatchPrompt, inputs: Inputs) -> Inputs | None:
        """Inputs `[B, P + L]` with the prompt's keys and values in the cache; None if they cannot be used."""
        mask, embeds = inputs.get("attention_mask"), inputs.get("inputs_embeds")
        if self._prompt_cache is None or self.training or torch.is_grad_enabled() or not prompt.is_shared:
            return None
        if inputs.get(cache_name()) is not None or inputs.get("position_ids") is not None:
            return None
        if not continues_from_cache(self.base_model):
            return None
        embeds = self.word_embeddings(inputs["input_ids"]) if embeds is None else embeds
        cache = self._prompt_cache.for_batch(self.base_model, prompt.embeds[0], embeds.shape[0])
        # Padding between prompt and text would push the prompt out of a sliding window.
        if cache is None or (has_sliding_layers(cache, self.base_model) and mask is not None and not mask.all()):
            return None
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return {
            **{name: value for name, value in inputs.items() if name != "input_ids"},
            "inputs_embeds": torch.cat([prompt.embeds.to(embeds), embeds], dim=1),
            "attention_mask": extend_mask(mask, prompt),
            cache_name(): cache,
        }

    def is_decoder_only(self) -> bool:
        """True for all model types, also unknown ones, except those of bidirectional models with a causal head."""
        return not has_head(self.base_model_type, "MASKED_LM")

    def padding_to_move(self, mask: Tensor) -> Tensor:
        """As for all tasks; none in a bidirectional architecture, for which `generate` computes positions."""
        return super().padding_to_move(mask) if self.is_decoder_only() else torch.zeros_like(mask, dtype=torch.bool)

    def prepend_prompt(self, prompt: BatchPrompt, inputs: Inputs) -> Inputs:
        """As for all tasks. In a row without a prompt nothing predicts the first token: it gets no label."""
        inputs = super().prepend_prompt(prompt, inputs)
        if prompt.lengths is not None and inputs.get("labels") is not None:
            is_first = inputs["attention_mask"].cumsum(-1) == 1
            inputs["labels"] = inputs["labels"].masked_fill(is_first & (prompt.lengths == 0).unsqueeze(1), -100)
        return at_labels(inputs) if self._logits_at_labels else inputs

    def prompted_forward(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Run the base model. A cache that is not empty already contains the prompt.

        Raises:
            ValueError: If a row begins with padding, and the model has the architecture of a bidirectional one, which
                numbers positions in its own way.
        """
        mask = inputs.get("attention_mask")
        if mask is not None and not self.is_decoder_only() and not torch.compiler.is_compiling():
            if not mask[:, 0].all():
                raise ValueError(
                    f"{self.base_model_type!r} numbers positions in its own way, and left padding would get between "
                    "prompt and text. Set `tokenizer.padding_side = 'right'`."
                )
        cache = inputs.get(cache_name())
        if cache is not None and cache.get_seq_length() > 0:
            return self.base_model(**self._after_cache(prompt, inputs))
        only_text = _needs_only_the_text(inputs) and accepts(self.base_model, "logits_to_keep")
        cached = self.continue_from_prompt(prompt, inputs) if only_text else None
        if cached is None:
            outputs = None
            share = pays_to_share(prompt, inputs) if self._share_prompt is None else self._share_prompt
            if share and self.is_decoder_only() and can_share(self.base_model, prompt, inputs):
                outputs = shared_forward(self.base_model, self.word_embeddings, prompt, inputs, self._logits_at_labels)
            return super().prompted_forward(prompt, inputs) if outputs is None else outputs
        length = prompt.embeds.shape[1]
        cached["inputs_embeds"] = cached["inputs_embeds"][:, length:]
        # Positions, not a number, as for a shared prompt.
        cached["logits_to_keep"] = torch.arange(-cached["logits_to_keep"], 0, device=cached["inputs_embeds"].device)
        if accepts(self.base_model, "position_ids"):
            cached["position_ids"] = positions_in(self.base_model, cached["attention_mask"])[:, length:].contiguous()
        return self.base_model(**cached)

    def _after_cache(self, prompt: BatchPrompt, inputs: Inputs) -> Inputs:
        inputs, length = dict(inputs), prompt.embeds.shape[1]
        position_ids, mask = inputs.pop("position_ids", None), inputs.get("attention_mask")
        if mask is not None:
            order = padding_first(self.padding_to_move(mask), length)
            inputs["attention_mask"] = reorder(extend_mask(mask, prompt), order)
            if position_ids is None and accepts(self.base_model, "position_ids"):
                positions = positions_in(self.base_model, inputs["attention_mask"])
                inputs["position_ids"] = positions[:, -text_of(inputs).shape[1] :].contiguous()
        if position_ids is not None:
            inputs["position_ids"] = extend_positions(position_ids, prompt)[:, length:]
        return inputs

    def prompted_generate(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Generate from prompt and text. The returned ids and the requested lengths refer to the text only."""
        input_ids = inputs["input_ids"]
        refuse_assistance(inputs, self.base_model)
        if not self.is_decoder_only():
            check_direction(inputs, self.base_model)
        if inputs.pop("position_ids", None) is not None:
            warnings.warn("`position_ids` are computed from the mask; those passed are dropped.", stacklevel=2)
        if setting("prefill_chunk_size", inputs, self.base_model) is not None:
            warnings.warn("`prefill_chunk_size` has no effect: prompt and text are read in one piece.", stacklevel=2)
            inputs["prefill_chunk_size"] = None
        cached = None
        if generates_from_a_filled_cache() and can_continue_from_cache(inputs, self.base_model):
            with torch.no_grad():  # as transformers' `generate`
                cached = self.continue_from_prompt(prompt, inputs)
        prompted = self.prepend_prompt(prompt, inputs) if cached is None else cached
        prompted.pop("position_ids", None)  # transformers computes them from the mask, at every step
        if cached is None:
            # Drop padding that all rows share: assisted decoding, which takes one row, fails with any.
            unused = int(prompted["attention_mask"].any(dim=0).long().argmax())
            for name in ("attention_mask", "inputs_embeds"):
                prompted[name] = prompted[name][:, unused:]
        count_new_tokens(prompted, self.base_model, input_ids.shape[1])
        prompted["input_ids"] = input_ids
        base_model = taking_embeds(self.base_model, self.word_embeddings, prompted)
        return penalizing_text(base_model, input_ids, prompted).generate(**prompted)


def _needs_only_the_text(inputs: Inputs) -> bool:
    """Whether a forward pass asks for no output that includes the prompt's own positions."""
    kept = inputs.get("logits_to_keep")
    others = ("labels", "output_hidden_states", "output_attentions")
    return (
        isinstance(kept, int)
        and 0 < kept <= text_of(inputs).shape[1]
        and not any(inputs.get(name) is not None for name in others)
    )
