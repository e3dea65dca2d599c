"""TRL's SFTTrainer takes the config and builds the model: what it computes, resumes and what is refused."""

import copy

import pytest
import torch
from conftest import make_config, sharpen, tiny_llama
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from peft_residual import ResidualOptimizerFactory, disable_base_dropout, get_prompt_tensor


ROWS = [
    {"prompt": "this film is", "completion": " good"},
    {"prompt": "the song of the bird in the place was", "completion": " poor"},
    {"prompt": "a cat", "completion": " fast up"},
    {"prompt": "no person it is one red book", "completion": " bad"},
] * 4


def make_trainer(folder, tokenizer, callbacks=(), num_virtual_tokens=4, **settings):
    values = {
        "output_dir": str(folder),
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    torch.manual_seed(0)  # the same frozen model each time
    config = make_config(
        task_type="CAUSAL_LM", prompt_tuning_init_seed=0, encoder_dropout=0.2, num_virtual_tokens=num_virtual_tokens
    )
    trainer = SFTTrainer(
        tiny_llama(attention_dropout=0.5),
        SFTConfig(**{**values, **settings}),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=config,
        optimizer_cls_and_kwargs=(ResidualOptimizerFactory, {"learning_rate": 0.1}),
        callbacks=list(callbacks),
    )
    disable_base_dropout(trainer.model)
    return trainer


def test_the_loss_is_that_of_the_answers_whatever_stands_beside_them(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, bf16=False)
    trainer.model.eval()
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    total = count = 0
    for row in ROWS[:4]:
        question, answer = (
            tokenizer(row[name], return_tensors="pt")["input_ids"] for name in ("prompt", "completion")
        )
        answer = torch.cat([answer, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
        labels = torch.cat([torch.full_like(question, -100), answer], dim=1)
        alone = trainer.model(input_ids=torch.cat([question, answer], dim=1), labels=labels).loss
        total, count = total + alone * answer.shape[1], count + answer.shape[1]
    assert torch.allclose(loss, total / count, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_training_reaches_every_weight_with_gradient_checkpointing_and_autocast(bf16, tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, bf16=bf16)
    assert trainer.args.gradient_checkpointing
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name
    assert [group["name"] for group in trainer.optimizer.param_groups] == ["encoder", "encoder_no_decay", "prompt"]


def test_resuming_equals_never_having_stopped(tmp_path, tokenizer):
    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    straight = make_trainer(tmp_path / "straight", tokenizer)
    straight.train()
    make_trainer(tmp_path / "stopped", tokenizer, [Stop()]).train()
    resumed = make_trainer(tmp_path / "stopped", tokenizer)
    resumed.train(resume_from_checkpoint=True)
    one, other = (load_file(tmp_path / f / "checkpoint-4/adapter_model.safetensors") for f in ("straight", "stopped"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(get_prompt_tensor(straight.model), get_prompt_tensor(resumed.model))


@pytest.mark.parametrize("settings", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 32}])
def test_rows_that_hold_several_texts_are_refused(settings, tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, **settings)
    with pytest.raises(ValueError, match="packing=False"):
        trainer.train()


# --- one prompt for all rows of a batch -----------------------------------------------------------------------------


@pytest.mark.parametrize("gradient_checkpointing", (True, False))
def test_supervised_training_learns_the_same_with_a_shared_prompt(gradient_checkpointing, tmp_path, tokenizer, shared):
    logs, prompts = [], []
    for share in (False, None):
        trainer = make_trainer(
            tmp_path / str(share),
            tokenizer,
            num_virtual_tokens=20,
            max_steps=20,
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=gradient_checkpointing,
        )
        trainer.model.share_prompt(share)
        trainer.train()
        names = ("loss", "entropy", "mean_token_accuracy", "num_tokens")
        logs.append([entry[name] for entry in trainer.state.log_history if "loss" in entry for name in names])
        prompts.append(get_prompt_tensor(trainer.model))
        assert len(shared) == (0 if share is False else 20)
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    assert (prompts[1] - prompts[0]).norm() <= 1e-5 * prompts[0].norm()


QUIET = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "seed": 3}


def make_policy_trainer(folder, tokenizer, **settings):
    torch.manual_seed(0)
    values = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "learning_rate": 0.1}
    return GRPOTrainer(
        tiny_llama(),
        reward_funcs=lambda completions, **kwargs: [float(len(set(text.split()))) for text in completions],
        args=GRPOConfig(output_dir=str(folder), **{**values, **QUIET, **settings}),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        processing_class=tokenizer,
        peft_config=make_config(task_type="CAUSAL_LM", prompt_tuning_init_seed=0, num_virtual_tokens=20),
    )


def test_policy_optimization_learns_the_same_with_a_shared_prompt(tmp_path, tokenizer, shared):
    prompts = []
    for share in (False, None):
        trainer = make_policy_trainer(tmp_path / str(share), tokenizer, max_steps=20)
        trainer.model.share_prompt(share)
        before = get_prompt_tensor(trainer.model)
        trainer.train()
        prompts.append(get_prompt_tensor(trainer.model))
        assert not torch.equal(prompts[-1], before)
        assert bool(shared) == (share is None)
    assert (prompts[1] - prompts[0]).norm() <= 1e-5 * prompts[0].norm()


# --- preferences and rewards ----------------------------------------------------------------------------------------

PREFERENCES = [{**row, "chosen": row["completion"], "rejected": " maybe down"} for row in ROWS[:4]]


def log_probability(model, tokenizer, text, answer, end=True):
    """Of an answer and the end of the text, from one row without padding."""
    question, answer = (tokenizer(part, return_tensors="pt")["input_ids"] for part in (text, answer))
    if end:
        answer = torch.cat([answer, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
    with torch.no_grad():
        logits = model(input_ids=torch.cat([question, answer], dim=1)).logits[0, -answer.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(1, answer[0, :, None]).sum()


def test_preferences_are_measured_against_the_model_without_the_prompt(tmp_path, tokenizer):
    torch.manual_seed(0)
    trainer = DPOTrainer(
        sharpen(tiny_llama(), 4.0),
        args=DPOConfig(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=0.3,
            logging_steps=1,
            beta=0.5,
            **QUIET,
        ),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
        peft_config=make_config(task_type="CAUSAL_LM", prompt_tuning_init_seed=0, num_virtual_tokens=4),
    )
    model = trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    expected = []
    for row in PREFERENCES:
        ratios = []
        for name in ("chosen", "rejected"):
            with model.disable_adapter():
                reference = log_probability(model, tokenizer, row["prompt"], row[name])
            ratios.append(log_probability(model, tokenizer, row["prompt"], row[name]) - reference)
        expected.append(-torch.nn.functional.logsigmoid(0.5 * (ratios[0] - ratios[1])))
    assert not torch.allclose(loss, torch.tensor(2.0).log(), atol=0.01)  # the loss of a model that is its reference
    torch.testing.assert_close(loss.detach(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["MLP1", "SUPERPOS"])
def test_preferences_of_a_trained_prompt_are_measured_against_that_prompt(kind, tmp_path, tokenizer):
    base = sharpen(tiny_llama(), 4.0)
    config = make_config(task_type="CAUSAL_LM", encoder_reparameterization_type=kind, num_virtual_tokens=4)
    first = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        first.prompt_encoder["default"].embedding.weight.normal_(generator=torch.Generator().manual_seed(1))
    first.save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(base, tmp_path / "first", is_trainable=True)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=0.3, beta=0.5, **QUIET
        ),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
    )
    model.eval()
    reference = [log_probability(first.eval(), tokenizer, row["prompt"], row["chosen"]) for row in PREFERENCES]
    batch = next(iter(trainer.get_train_dataloader()))
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)).detach(), torch.tensor(2.0).log())
    trainer.train()
    model.eval()
    assert trainer.compute_loss(model, dict(batch)) < torch.tensor(2.0).log() - 0.01
    model.set_adapter("ref")
    after = [log_probability(model, tokenizer, row["prompt"], row["chosen"]) for row in PREFERENCES]
    torch.testing.assert_close(torch.stack(after), torch.stack(reference))


def test_a_policy_s_probabilities_are_those_of_each_row_alone(tmp_path, tokenizer):
    trainer = make_policy_trainer(tmp_path, tokenizer)
    texts, answers = [row["prompt"] for row in ROWS[:3]], [row["completion"] for row in ROWS[:3]]
    ids = {  # as the trainer pads them: questions on the left, answers on the right
        side: tokenizer(rows, padding=True, padding_side=side, return_tensors="pt")
        for side, rows in (("left", texts), ("right", answers))
    }
    inputs, mask = (torch.cat([ids["left"][n], ids["right"][n]], dim=1) for n in ("input_ids", "attention_mask"))
    model, length = trainer.model.eval(), ids["right"]["input_ids"].shape[1]
    found = trainer._get_per_token_logps_and_entropies(model, inputs, mask, length)[0]
    total = (found * ids["right"]["attention_mask"]).sum(dim=1)
    pairs = zip(texts, answers, strict=True)
    expected = [log_probability(model, tokenizer, text, answer, end=False) for text, answer in pairs]
    torch.testing.assert_close(total.detach(), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_generation_that_leaves_out_the_prompt_is_refused(tmp_path, tokenizer):
    trainer = make_policy_trainer(tmp_path, tokenizer, use_transformers_continuous_batching=True, max_steps=1)
    with pytest.raises((AttributeError, ValueError), match=r"generate_batch.* prompt"):
        trainer.train()
