"""HF Trainer: exact resume in a new process, the best model at the end, evaluation of every task."""

import pytest
import torch
from fresh_process import run_python
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from scenarios import SCENARIOS, fresh, outputs_of
from trainers import STEPS, make_trainer
from transformers import TrainerCallback

from peft_residual import disable_base_dropout


RESUME_PROCESS = """
import sys
sys.path.insert(0, "tests")
from conftest import torch
from trainers import make_trainer
config = {"encoder_reparameterization_type": sys.argv[3], "num_virtual_tokens": int(sys.argv[4])}
trainer = make_trainer(sys.argv[1], name=sys.argv[2], config=config)
trainer.train(resume_from_checkpoint=True)
"""


def assert_same_state(left, right):
    """Weights and the optimizer's state of two checkpoints, bit for bit."""
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (left, right))
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key
    one, other = (torch.load(folder / "optimizer.pt") for folder in (left, right))
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for index, moments in one["state"].items():
        for key, value in moments.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][index][key])), (index, key)


RESUMED = [
    ("t5", "MLP1", 4),
    ("llama", "TRANSFORMER", 4),
    ("llama", "MLP1", 24),  # long enough to be shared by the rows of a batch
    ("bert-sequence", "MLP2", 4),
    ("gpt2", "SUPERPOS", 4),
]


@pytest.mark.parametrize("name, kind, tokens", RESUMED)
def test_resuming_in_a_new_process_equals_never_having_stopped(name, kind, tokens, tmp_path):
    config = {"encoder_reparameterization_type": kind, "num_virtual_tokens": tokens}
    straight = tmp_path / "straight"
    make_trainer(straight, name, config=config).train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == STEPS

    interrupted = tmp_path / "interrupted"
    make_trainer(interrupted, name, config=config, callbacks=[Stop()]).train()
    assert not (interrupted / f"checkpoint-{2 * STEPS}").exists()
    run_python(RESUME_PROCESS, interrupted, name, kind, tokens).check_returncode()
    assert_same_state(*(folder / f"checkpoint-{2 * STEPS}" for folder in (straight, interrupted)))
    start, end = (load_file(straight / f"checkpoint-{n}/adapter_model.safetensors") for n in (STEPS, 2 * STEPS))
    frozen = {key for key in start if torch.equal(start[key], end[key])}
    rows = {"residual_prompt_tuning.network.rows"} if kind == "SUPERPOS" else set()
    assert frozen == {"residual_prompt_tuning.format_version"} | rows


def test_best_model_at_the_end_is_the_best_checkpoint_exactly(tmp_path):
    scores = iter([0.1, 0.9, 0.3, 0.2, 0.9])  # the second of four checkpoints is the best
    trainer = make_trainer(
        tmp_path,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.compute_metrics = lambda prediction: {"score": next(scores)}
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-4")
    batch = SCENARIOS["t5"].batch()
    loaded = PeftModel.from_pretrained(fresh(trainer.model.base_model), best)
    assert torch.equal(outputs_of(trainer.model, batch), outputs_of(loaded, batch))
    last = PeftModel.from_pretrained(fresh(trainer.model.base_model), tmp_path / f"checkpoint-{2 * STEPS}")
    assert not torch.equal(outputs_of(loaded, batch), outputs_of(last, batch))
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.evaluate()["eval_loss"] == losses[4]
    state = load_file(f"{best}/adapter_model.safetensors")
    assert all(torch.equal(t, state[k]) for k, t in get_peft_model_state_dict(trainer.model).items())


@pytest.mark.parametrize("name", ["t5", "gpt2", "bert-sequence", "bert-token", "bert-question"])
def test_trainer_trains_and_evaluates_every_task(name, tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["shapes"] = [[len(p), *p.shape[1:]] for p in (prediction.predictions, prediction.label_ids)]
        return {}

    settings = {"max_steps": 40, "learning_rate": 0.03, "per_device_train_batch_size": 16, "save_strategy": "no"}
    trainer = make_trainer(tmp_path, name, config={"encoder_dropout": 0.0}, **settings)
    if name == "bert-token":
        trainer.compute_metrics = compute_metrics
    disable_base_dropout(trainer.model)  # noise that would hide a small gain
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    if name == "bert-token":
        assert seen["shapes"] == [[16, 7, 3], [16, 7]]  # a score for each label


def test_resuming_with_another_network_fails_before_training(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=STEPS)
    trainer.train()
    other = make_trainer(tmp_path, config={"encoder_hidden_size": 9})
    with pytest.raises(ValueError, match=r"network.down.weight: expected \[9, 16\], found \[8, 16\]"):
        other.train(resume_from_checkpoint=True)
