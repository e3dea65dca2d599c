"""A Trainer for each scenario, with rows of random tokens."""

import torch
from conftest import make_config
from hosts import TRANSFORMERS
from peft import get_peft_model
from scenarios import SCENARIOS
from transformers import Trainer, TrainingArguments


STEPS = 4  # saved halfway: 2 * STEPS in all


class Rows(torch.utils.data.Dataset):
    """Rows of random tokens, with the labels of a scenario."""

    def __init__(self, scenario, count=16):
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(3, 64, (count, 7), generator=generator)
        columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **scenario.labels(ids)}
        if "start_positions" in columns:
            columns |= {"start_positions": ids[:, 0] % 7, "end_positions": ids[:, 1] % 7}
        self.rows = [{name: column[i] for name, column in columns.items()} for i in range(count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def arguments(folder, **overrides):
    values = {
        "output_dir": str(folder),
        "max_steps": 2 * STEPS,
        "save_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 11,
    }
    return TrainingArguments(**{**values, **overrides})


def make_trainer(folder, name="t5", callbacks=None, config=None, **overrides):
    torch.manual_seed(0)
    scenario = SCENARIOS[name]
    settings = {"prompt_tuning_init_seed": 1, **(config or {})}
    if settings.get("encoder_reparameterization_type") != "SUPERPOS":  # which has no dropout
        settings.setdefault("encoder_dropout", 0.3)
    model = get_peft_model(scenario.build(), make_config(task_type=scenario.task_type, **settings))
    rows = Rows(scenario)
    if TRANSFORMERS < (4, 56):  # which finds no labels in a `PeftModel`, and evaluates without a loss
        overrides.setdefault("label_names", [name for name in rows[0] if name not in ("input_ids", "attention_mask")])
    return Trainer(
        model, arguments(folder, **overrides), train_dataset=rows, eval_dataset=rows, callbacks=callbacks or []
    )
