"""Train a residual prompt, interrupt, resume, evaluate, merge it, and reload it without this package.

    python examples/demo.py                     # the embedded model and task: 3 minutes on 2 CPU cores, offline

Plain prompt tuning is trained for comparison, with the same model, data, steps and batches. The script also takes a
real model and data set:

    python examples/demo.py --model google/t5-v1_1-base --dataset nyu-mll/glue --subset sst2 \\
        --text_column sentence --label_words negative positive --max_steps 2000 --learning_rate 0.3
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from common import Arguments, decode, exact_match, make_output_dir, parse, room_for_text, training_arguments
from datasets import DatasetDict, load_dataset
from embedded.tasks import MODEL, TASKS, load_task
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from peft_residual import ResidualPromptTuningConfig, save_as_prompt_tuning


@dataclass
class DemoArguments(Arguments):
    """What to train, and on which data; both methods use the same."""

    model: str = field(default=str(MODEL), metadata={"help": "Encoder-decoder model: a folder or a Hub id."})
    dataset: str = field(
        default="sentiment", metadata={"help": f"One of {', '.join(TASKS)}, or a data set on the Hub."}
    )
    subset: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    text_column: str = field(default="text", metadata={"help": "Column with the input text."})
    label_words: list[str] | None = field(default=None, metadata={"help": "A word for each class, if labels are ids."})
    max_steps: int = field(default=300, metadata={"help": "Training steps."})
    output_dir: Path = field(default=Path("build/demo"), metadata={"help": "Output folder."})


class Interrupt(TrainerCallback):
    """Stop at the first checkpoint in the second half of the training."""

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= args.max_steps // 2


def load_data(args: DemoArguments, tokenizer) -> DatasetDict:
    if args.dataset in TASKS:
        data = load_task(args.dataset, seed=args.seed)
    else:
        data = load_dataset(args.dataset, args.subset)
        # The test labels are hidden: one half of the validation split is used for testing.
        halves = data["validation"].train_test_split(0.5, seed=args.seed)
        data = DatasetDict(train=data["train"], validation=halves["train"], test=halves["test"])
    if not args.label_words and not isinstance(data["train"][0]["label"], str):
        sys.exit(f"--dataset {args.dataset} has class ids as labels. Give a word for each: --label_words no yes")
    if args.smoke:
        data = DatasetDict({name: split.select(range(32)) for name, split in data.items()})

    def tokenize(rows):
        labels = [args.label_words[i] for i in rows["label"]] if args.label_words else rows["label"]
        inputs = tokenizer(rows[args.text_column], truncation=True, max_length=room_for_text(tokenizer, args))
        return {**inputs, "labels": tokenizer(labels)["input_ids"]}

    return data.map(tokenize, batched=True, remove_columns=data["train"].column_names)


def make_trainer(args: DemoArguments, name: str, config, data: DatasetDict, tokenizer, callbacks=()) -> Seq2SeqTrainer:
    base = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32, dropout_rate=0.0)
    steps = max(2, args.max_steps // 12)

    settings = {
        **training_arguments(args),
        "output_dir": str(args.output_dir / name),
        "learning_rate": args.learning_rate,
        "weight_decay": 1e-5,
        "per_device_eval_batch_size": 100,
        "eval_steps": steps,
        "save_steps": steps,
        "metric_for_best_model": "exact_match",
        "predict_with_generate": True,
        "generation_max_length": 10,
    }
    return Seq2SeqTrainer(
        get_peft_model(base, config),
        Seq2SeqTrainingArguments(**settings),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=exact_match(tokenizer),
        callbacks=list(callbacks),
    )


# Runs in a separate process, without this package.
RELOAD = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM
base, adapter, inputs = sys.argv[1:4]
model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
assert "peft_residual" not in sys.modules
batches = torch.load(inputs)
print(json.dumps([row for batch in batches for row in model.generate(**batch, max_length=10).tolist()]))
"""


def predictions_of_merged(args: DemoArguments, merged: Path, trainer: Seq2SeqTrainer, data) -> list[str]:
    batches = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in trainer.get_test_dataloader(data)]
    torch.save(batches, args.output_dir / "test_inputs.pt")
    command = [sys.executable, "-W", "ignore", "-c", RELOAD, args.model, merged, args.output_dir / "test_inputs.pt"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [trainer.data_collator.tokenizer.decode(r, skip_special_tokens=True) for r in json.loads(printed)]


def draw(curves: dict[str, list[tuple[int, float]]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel="exact match on validation", ylim=(-0.02, 1.02), title=title)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse(DemoArguments)
    make_output_dir(args)
    transformers.logging.set_verbosity_error()

    # Data
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_data(args, tokenizer)

    # Config
    configs = {
        "prompt tuning": lambda: PromptTuningConfig(
            task_type="SEQ_2_SEQ_LM",
            num_virtual_tokens=args.num_virtual_tokens,
            num_transformer_submodules=1,
            prompt_tuning_init="SAMPLE_VOCAB",
        ),
        "residual": lambda: ResidualPromptTuningConfig(
            task_type="SEQ_2_SEQ_LM",
            num_virtual_tokens=args.num_virtual_tokens,
            tokenizer_name_or_path=args.model,
            prompt_tuning_init_seed=args.seed,
        ),
    }

    # Model, train, evaluate
    rows, curves = [], {}
    for name, make_config in configs.items():
        print(f"\n== {name} ==", flush=True)
        torch.manual_seed(args.seed)
        start = time.perf_counter()
        if name == "residual":
            make_trainer(args, name, make_config(), data, tokenizer, [Interrupt()]).train()
            print("Interrupted. A new model and a new Trainer resume from the last checkpoint.", flush=True)
        trainer = make_trainer(args, name, make_config(), data, tokenizer)
        trainer.train(resume_from_checkpoint=name == "residual")
        seconds = time.perf_counter() - start
        curves[name] = [(e["step"], e["eval_exact_match"]) for e in trainer.state.log_history if "eval_loss" in e]
        test = trainer.predict(data["test"])
        rows.append((name, trainer.model.get_nb_trainable_parameters()[0], seconds, test.metrics["test_exact_match"]))

    # Save, reload
    merged = args.output_dir / "merged"
    save_as_prompt_tuning(trainer.model, merged)
    same = predictions_of_merged(args, merged, trainer, data["test"]) == decode(tokenizer, test.predictions)
    draw(curves, args.output_dir / "curves.png", f"{args.dataset}, {args.num_virtual_tokens} tokens")

    print(f"\n{'method':15} {'trained':>10} {'seconds':>8} {'test exact match':>17}")
    for name, trained, seconds, accuracy in rows:
        print(f"{name:15} {trained:>10,} {seconds:>8.0f} {accuracy:>17.1%}")
    size = (merged / "adapter_model.safetensors").stat().st_size
    print(f"\nmerged adapter: {merged} ({size / 1024:.1f} KB), loads with PEFT alone")
    print(f"predictions of the merged adapter in a process without peft_residual: {'same' if same else 'DIFFERENT'}")
    print(f"curves: {args.output_dir / 'curves.png'}")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
