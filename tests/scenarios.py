"""The six tasks that PEFT knows, each with a tiny base model and a batch: shared by the tests of whole models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from conftest import VOCAB_SIZE, make_config, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from peft import get_peft_model


@dataclass(frozen=True)
class Scenario:
    """A task type, a base model, and what its labels look like."""

    task_type: str
    build: Callable[..., Any]
    labels: Callable[[torch.Tensor], dict[str, torch.Tensor]]

    def batch(self, labels: bool = True) -> dict[str, torch.Tensor]:
        """Two rows of seven tokens, the second with two tokens of right padding."""
        ids = torch.randint(3, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        ids[1, -2:], mask[1, -2:] = 0, 0
        return {"input_ids": ids, "attention_mask": mask, **(self.labels(ids) if labels else {})}

    def model(self, base: Any = None, adapter_name: str = "default", **overrides: Any) -> Any:
        """A residual adapter on the base model, trained for two steps so that no weight has its initial value."""
        base = self.build() if base is None else base
        config = make_config(**{"task_type": self.task_type, "prompt_tuning_init_seed": 0, **overrides})
        model = get_peft_model(base, config, adapter_name=adapter_name)
        train(model, self, steps=2)
        return model.eval()


def train(model: Any, scenario: Scenario, steps: int, lr: float = 0.1) -> None:
    """A few plain steps on the scenario's batch, with the same dropout masks in every call."""
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    batch = scenario.batch()
    for _ in range(steps):
        outputs = model(**batch)
        loss = outputs.loss if "loss" in outputs and outputs.loss is not None else outputs[0].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def outputs_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first output tensor that is no loss, without gradients, in eval mode."""
    model.eval()
    with torch.no_grad():
        outputs = model(**batch)
    return next(v for k, v in outputs.items() if k != "loss")


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of two tensors, relative to the largest number that is expected."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def make_batch(rows: int = 6, length: int = 7, padding_side: str = "right") -> dict[str, torch.Tensor]:
    """Token ids and their mask; every second row has one to three tokens of padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows, 2):
        count = row % 3 + 1
        pads = slice(length - count, None) if padding_side == "right" else slice(0, count)
        ids[row, pads], mask[row, pads] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def fresh(base: Any) -> Any:
    """An untouched copy of a base model."""
    return copy.deepcopy(base)


def _token_labels(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    labels = ids % 3
    labels[1, -2:] = -100
    return {"labels": labels}


SCENARIOS = {
    "t5": Scenario("SEQ_2_SEQ_LM", tiny_t5, lambda ids: {"labels": ids[:, :4].contiguous()}),
    "gpt2": Scenario("CAUSAL_LM", tiny_gpt2, lambda ids: {"labels": ids.masked_fill(ids == 0, -100)}),
    "llama": Scenario("CAUSAL_LM", tiny_llama, lambda ids: {"labels": ids.masked_fill(ids == 0, -100)}),
    "bert-sequence": Scenario(
        "SEQ_CLS", lambda: tiny_bert("SequenceClassification", num_labels=3), lambda ids: {"labels": ids[:, 0] % 3}
    ),
    "bert-token": Scenario("TOKEN_CLS", lambda: tiny_bert("TokenClassification", num_labels=3), _token_labels),
    "bert-question": Scenario(
        "QUESTION_ANS",
        lambda: tiny_bert("QuestionAnswering"),
        lambda ids: {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([3, 4])},
    ),
    "bert-features": Scenario("FEATURE_EXTRACTION", lambda: tiny_bert(""), lambda ids: {}),
}
