"""`PromptReportCallback`: the prompt's figures go through `Trainer.log`, and training does not change."""

import pytest
import torch
from peft import get_peft_model_state_dict
from trainers import STEPS, make_trainer
from transformers import TrainerCallback

from peft_residual import inspect_prompt
from peft_residual.analysis import PromptReportCallback


class Logger(TrainerCallback):
    """Keeps what loggers get."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def trained(folder, tokenizer=None, report=True, name="llama", **arguments):
    trainer, logger = make_trainer(folder, name=name, logging_steps=2, **arguments), Logger()
    trainer.add_callback(logger)
    if report:
        trainer.add_callback(PromptReportCallback(trainer, tokenizer, tokens=2, k=3))
    torch.manual_seed(0)
    trainer.train()
    return trainer, logger


def test_figures_come_with_the_loss_and_are_those_of_the_report(tmp_path, tokenizer, capsys):
    trainer, logger = trained(tmp_path, tokenizer)
    found = [(step, logs) for step, logs in logger.logs if "prompt_norm" in logs]
    assert [step for step, _ in found] == [0, *(step for step, logs in logger.logs if "loss" in logs)]
    assert found[0][1]["prompt_distance"] == 0
    assert found[-1][1]["prompt_distance"] > found[1][1]["prompt_distance"] > 0
    report, norms = inspect_prompt(trainer.model, tokenizer, k=3), inspect_prompt(trainer.model).vocabulary_norms
    last = found[-1][1]
    assert found[-1][0] == 2 * STEPS
    assert last["prompt_norm"] == pytest.approx((report.norms.median() / norms.median()).item())
    assert last["prompt_network_share"] == pytest.approx(report.network_share.mean().item())
    words = [" ".join(of_token) for of_token in report.nearest["projected"]["cosine"].tokens[:2]]
    assert [logs for logs in trainer.state.log_history if "prompt_nearest" in logs][-1]["prompt_nearest"] == words
    assert " | ".join(words) in capsys.readouterr().out
    assert all(isinstance(value, (int, float)) for _, logs in logger.logs for value in logs.values())


def test_training_is_the_same_with_it(tmp_path, tokenizer):
    with_it, _ = trained(tmp_path / "with", tokenizer)
    without, _ = trained(tmp_path / "without", report=False)
    states = (get_peft_model_state_dict(trainer.model) for trainer in (with_it, without))
    one, other = states
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["t5", "bert-token"])
def test_other_kinds_of_models(tmp_path, name):
    _, logger = trained(tmp_path, name=name)
    assert any(logs.get("prompt_distance", 0) > 0 for _, logs in logger.logs)
