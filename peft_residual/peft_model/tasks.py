"""PEFT's class for each task except causal language modeling: what a prompt in front of the input changes there.

The classes have the names of PEFT's, because transformers' pipelines look for these names.
"""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from torch import Tensor

from .base import ResidualPeftModel
from .base_model import accepts
from .inputs import Inputs
from .mixed_batch import BatchPrompt


class PeftModelForSeq2SeqLM(ResidualPeftModel, peft.PeftModelForSeq2SeqLM):
    """Encoder-decoder models: the prompt is in front of the encoder's input, the decoder gets none."""

    def prompted_forward(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Run the base model. With `num_items_in_batch`, the loss is this batch's share of the mean over all of them.

        When it accumulates gradients, the Trainer passes the number of target tokens of all accumulated batches. T5
        and BART return the mean of each batch instead (transformers issue 47688), and gradients are multiplied by the
        number of batches.
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
        """As for all tasks. An encoder output that was computed before does not contain the prompt: recompute it."""
        inputs = dict(inputs)
        if inputs.pop("encoder_outputs", None) is not None:
            warnings.warn("`encoder_outputs` do not contain the prompt; they are recomputed.", stacklevel=2)
        return super().prepend_prompt(prompt, inputs)


class PeftModelForSequenceClassification(ResidualPeftModel, peft.PeftModelForSequenceClassification):
    """Sequence classification, with a trained head (`modules_to_save`)."""

    def prepend_prompt(self, prompt: BatchPrompt, inputs: Inputs) -> Inputs:
        """As for all tasks. A decoder-only model finds padding in `input_ids`: with embeddings it needs a mask."""
        ids, pad = inputs.get("input_ids"), getattr(self.base_model.config, "pad_token_id", None)
        if inputs.get("attention_mask") is None and ids is not None and pad is not None and self.is_decoder_only():
            inputs = {**inputs, "attention_mask": (ids != pad).long()}
        prompted = super().prepend_prompt(prompt, inputs)
        if prompted.get("global_attention_mask") is None and accepts(self.base_model, "global_attention_mask"):
            # Without one, such a model lets all tokens see the first one, and makes the mask from `input_ids`.
            first = torch.zeros_like(prompted["inputs_embeds"][:, :, 0], dtype=torch.long)
            first[:, 0] = 1
            prompted["global_attention_mask"] = first
        return prompted

    def padding_to_move(self, mask: Tensor) -> Tensor:
        """All padding, if decoder-only: such a model classifies at the last position, and sees none in embeddings."""
        return mask == 0 if self.is_decoder_only() else super().padding_to_move(mask)


class PeftModelForTokenClassification(ResidualPeftModel, peft.PeftModelForTokenClassification):
    """Token classification: one row of logits per input token, `[B, L, labels]`, none for the prompt."""

    has_token_labels = True

    def prompted_forward(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Run the base model and drop the prompt's logits."""
        return self.without_prompt(super().prompted_forward, prompt, inputs, ("logits",))


class PeftModelForQuestionAnswering(ResidualPeftModel, peft.PeftModelForQuestionAnswering):
    """Extractive question answering: positions and logits refer to input tokens, `[B, L]`, not to the prompt's."""

    def prompted_forward(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Run the base model with answer positions shifted by the prompt."""
        inputs = dict(inputs)
        for name in ("start_positions", "end_positions"):
            if inputs.get(name) is not None:
                # Transformers takes a position below 0 as the first one, and ignores one above the length.
                inputs[name] = inputs[name].clamp(min=0) + self.text_start(prompt, inputs)
        return self.without_prompt(super().prompted_forward, prompt, inputs, ("start_logits", "end_logits"))


class PeftModelForFeatureExtraction(ResidualPeftModel, peft.PeftModelForFeatureExtraction):
    """Feature extraction: one feature vector per input token, `[B, L, H]`, none for the prompt."""

    def prompted_forward(self, prompt: BatchPrompt, inputs: Inputs) -> Any:
        """Run the base model and drop the prompt's features."""
        names = ("last_hidden_state",)
        if getattr(self.base_model.config, "is_encoder_decoder", False):
            names = ("encoder_last_hidden_state",)
        return self.without_prompt(super().prompted_forward, prompt, inputs, names)
