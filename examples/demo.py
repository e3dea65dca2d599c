"""The whole way of a residual prompt: train, interrupt, resume, evaluate, merge, and reload without this package.

    python examples/demo.py                     # the embedded model and task: 3 minutes on 2 CPU cores, no network

Plain prompt tuning gets the same model, data, steps and batch. The same script takes a real model and data set:

    python examples/demo.py --model google/t5-v1_1-base --dataset nyu-mll/glue --subset sst2 \\
        --text_column sentence --label_words negative positive --max_steps 2000 --learning_rate 0.3
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from datasets import DatasetDict, load_dataset
from embedded.tasks import MODEL, TASKS, load_task
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from peft_residual import ResidualPromptTuningConfig, save_as_prompt_tuning


@dataclass
class DemoArguments:
    """What to train on what."""

    model: str = field(default=str(MODEL), metadata={"help": "Encoder-decoder model: a folder or a Hub id."})
    dataset: str = field(
        default="sentiment", metadata={"help": f"One of {', '.join(TASKS)}, or a data set on the Hub."}
    )
    subset: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    text_column: str = field(default="text", metadata={"help": "Column with the input text."})
    label_words: list[str] | None = field(default=None, metadata={"help": "A word per class, where labels are ids."})
    num_virtual_tokens: int = field(default=10, metadata={"help": "Prompt length."})
    learning_rate: float = field(default=0.3, metadata={"help": "Learning rate of both methods."})
    max_steps: int = field(default=300, metadata={"help": "Steps of both methods."})
    batch_size: int = field(default=32, metadata={"help": "Batch of both methods."})
    seed: int = field(default=0, metadata={"help": "Seed of prompts, networks and the order of data."})
    output_dir: Path = field(default=Path("build/demo"), metadata={"help": "Where everything is written."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the output folder."})
    smoke: bool = field(default=False, metadata={"help": "A few steps only, to see that everything runs."})


class Interrupt(TrainerCallback):
    """Stops at the first checkpoint of the second half."""

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= args.max_steps // 2


def load_data(args: DemoArguments, tokenizer) -> DatasetDict:
    if args.dataset in TASKS:
        data = load_task(args.dataset, seed=args.seed)
    else:
        data = load_dataset(args.dataset, args.subset)
        halves = data["validation"].train_test_split(0.5, seed=args.seed)  # hidden test labels: report on one half
        data = DatasetDict(train=data["train"], validation=halves["train"], test=halves["test"])
    if not args.label_words and not isinstance(data["train"][0]["label"], str):
        sys.exit(f"--dataset {args.dataset} has class ids as labels. Give a word for each: --label_words no yes")
    if args.smoke:
        data = DatasetDict({name: split.select(range(32)) for name, split in data.items()})

    def tokenize(rows):
        labels = [args.label_words[i] for i in rows["label"]] if args.label_words else rows["label"]
        length = min(tokenizer.model_max_length, 512) - args.num_virtual_tokens  # room for the prompt, before cutting
        inputs = tokenizer(rows[args.text_column], truncation=True, max_length=length)
        return {**inputs, "labels": tokenizer(labels)["input_ids"]}

    return data.map(tokenize, batched=True, remove_columns=data["train"].column_names)


def make_trainer(args: DemoArguments, name: str, config, data: DatasetDict, tokenizer, callbacks=()) -> Seq2SeqTrainer:
    base = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32, dropout_rate=0.0)
    steps = 2 if args.smoke else max(1, args.max_steps // 12)

    def exact_match(prediction):
        texts = decode(tokenizer, prediction.predictions), decode(tokenizer, prediction.label_ids)
        return {"exact_match": sum(a == b for a, b in zip(*texts, strict=True)) / len(texts[0])}

    arguments = Seq2SeqTrainingArguments(
        output_dir=str(args.output_dir / name),
        max_steps=4 if args.smoke else args.max_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=1e-5,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=100,
        eval_strategy="steps",
        eval_steps=steps,
        save_steps=steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="exact_match",
        predict_with_generate=True,
        generation_max_length=10,
        seed=args.seed,
        report_to=[],
        disable_tqdm=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return Seq2SeqTrainer(
        get_peft_model(base, config),
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=exact_match,
        callbacks=list(callbacks),
    )


def decode(tokenizer, ids) -> list[str]:
    ids = [[token if token >= 0 else tokenizer.pad_token_id for token in row] for row in ids.tolist()]
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


# Runs in a process of its own, with stock PEFT only.
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel="exact match on validation", ylim=(-0.02, 1.02), title=title)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    (args,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()
    if args.output_dir.exists() and not args.overwrite:
        sys.exit(f"--output_dir {args.output_dir} exists. Choose another folder, or pass --overwrite.")
    shutil.rmtree(args.output_dir, ignore_errors=True)
    args.output_dir.mkdir(parents=True)
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_data(args, tokenizer)
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
    rows, curves = [], {}
    for name, make_config in configs.items():
        print(f"\n== {name} ==", flush=True)
        torch.manual_seed(args.seed)
        start = time.perf_counter()
        if name == "residual":
            make_trainer(args, name, make_config(), data, tokenizer, [Interrupt()]).train()
            print("Interrupted. A new model and a new trainer go on from the last checkpoint.", flush=True)
        trainer = make_trainer(args, name, make_config(), data, tokenizer)
        trainer.train(resume_from_checkpoint=name == "residual")
        seconds = time.perf_counter() - start
        history = [entry for entry in trainer.state.log_history if "eval_exact_match" in entry]
        curves[name] = [(entry["step"], entry["eval_exact_match"]) for entry in history]
        test = trainer.predict(data["test"])
        accuracy = test.metrics["test_exact_match"]
        rows.append((name, trainer.model.get_nb_trainable_parameters()[0], seconds, accuracy))

    merged = args.output_dir / "merged"
    save_as_prompt_tuning(trainer.model, merged)
    same = predictions_of_merged(args, merged, trainer, data["test"]) == decode(tokenizer, test.predictions)
    draw(curves, args.output_dir / "curves.png", f"{args.dataset}, {args.num_virtual_tokens} tokens")
    kilobytes = (merged / "adapter_model.safetensors").stat().st_size / 1024

    print(f"\n{'method':15} {'trained':>10} {'seconds':>8} {'test exact match':>17}")
    for name, trained, seconds, accuracy in rows:
        print(f"{name:15} {trained:>10,} {seconds:>8.0f} {accuracy:>17.1%}")
    print(f"\nmerged adapter: {merged} ({kilobytes:.1f} KB), loads with stock PEFT")
    print(f"predictions of the merged adapter in a process without peft_residual: {'same' if same else 'DIFFERENT'}")
    print(f"curves: {args.output_dir / 'curves.png'}")
    print("a real model: python examples/demo.py --model google/t5-v1_1-base --dataset ... (see --help)")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
