"""TRL's SFTTrainer takes the config and builds the model: what it computes, resumes and what is refused."""

import pytest
import torch
from conftest import make_config, tiny_llama
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

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


def test_policy_optimization_learns_the_same_with_a_shared_prompt(tmp_path, tokenizer, shared):
    prompts = []
    for share in (False, None):
        torch.manual_seed(0)
        trainer = GRPOTrainer(
            tiny_llama(),
            reward_funcs=lambda completions, **kwargs: [float(len(set(text.split()))) for text in completions],
            args=GRPOConfig(
                output_dir=str(tmp_path / str(share)),
                max_steps=20,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=6,
                learning_rate=0.1,
                use_cpu=True,
                bf16=False,
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
                seed=3,
            ),
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
            processing_class=tokenizer,
            peft_config=make_config(task_type="CAUSAL_LM", prompt_tuning_init_seed=0, num_virtual_tokens=20),
        )
        trainer.model.share_prompt(share)
        before = get_prompt_tensor(trainer.model)
        trainer.train()
        prompts.append(get_prompt_tensor(trainer.model))
        assert not torch.equal(prompts[-1], before)
        assert bool(shared) == (share is None)
    assert (prompts[1] - prompts[0]).norm() <= 1e-5 * prompts[0].norm()
