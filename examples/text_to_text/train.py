"""Train T5 on a text-to-text task, with residual prompt tuning, plain prompt tuning or full fine-tuning.

python examples/text_to_text/train.py --smoke                          # seconds, offline
python examples/text_to_text/train.py --task embedded/sentiment        # a minute on a CPU, offline
python examples/text_to_text/train.py --task super_glue/rte --model google/t5-v1_1-base --k_per_class 100
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import DatasetDict
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `text_to_text`

from text_to_text.arguments import FORM, Arguments
from text_to_text.data import find_task, load_texts, longest_target, tokenize
from text_to_text.interruption import SaveOnInterrupt, exit_with_command
from text_to_text.metrics import METRICS
from text_to_text.report import report
from text_to_text.tasks import Task

from peft_residual import (
    ResidualOptimizerFactory,
    ResidualPromptTuningConfig,
    disable_base_dropout,
    save_as_prompt_tuning,
)


def load_data(args: Arguments, task: Task, tokenizer) -> DatasetDict:
    """Load and tokenize the data. Texts are truncated so that there is room for the prompt."""
    limits = args.k_per_class, args.max_train_samples, args.max_eval_samples
    texts = load_texts(task, args.data_dir, *limits, seed=args.seed)
    prompt = 0 if args.method == "fine_tuning" else args.num_virtual_tokens
    return tokenize(texts, tokenizer, args.max_source_length - prompt, longest_target(task, tokenizer))


def make_model(args: Arguments):
    """Create the model to train. Only full fine-tuning keeps the dropout of the base model."""
    base = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
    if args.method == "fine_tuning":
        return base
    if args.method == "residual":
        config = ResidualPromptTuningConfig(
            task_type="SEQ_2_SEQ_LM",
            num_virtual_tokens=args.num_virtual_tokens,
            **{name: getattr(args, name) for name in FORM},
            tokenizer_name_or_path=args.model,
            prompt_tuning_init_seed=args.seed,
        )
    else:
        config = PromptTuningConfig(
            task_type="SEQ_2_SEQ_LM",
            num_virtual_tokens=args.num_virtual_tokens,
            num_transformer_submodules=1,
            prompt_tuning_init="SAMPLE_VOCAB",
        )
    model = get_peft_model(base, config)
    disable_base_dropout(model)
    return model


def make_scorer(task: Task, rows, tokenizer):
    """Return a function that computes the task's metrics for the predictions of `rows`."""

    def score(prediction) -> dict[str, float]:
        ids = np.where(prediction.predictions < 0, tokenizer.pad_token_id, prediction.predictions)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return {name: METRICS[name](texts, rows, task.words) for name in task.metrics}

    return score


def make_trainer(args: Arguments, task: Task, data: DatasetDict, tokenizer) -> Seq2SeqTrainer:
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(args.output_dir),
        num_train_epochs=args.num_epochs,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=args.weight_decay,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.eval_batch_size,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=task.metrics[0],
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,  # resume the early stopping counter too
        predict_with_generate=True,
        generation_max_length=longest_target(task, tokenizer) + 1,  # plus the decoder's start token
        bf16=args.bf16,
        seed=args.seed,
        report_to=[],
        disable_tqdm=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    rates = {
        "learning_rate": args.learning_rate,
        "encoder_learning_rate": args.encoder_learning_rate,
        "weight_decay": args.weight_decay,
    }
    trainer = Seq2SeqTrainer(
        make_model(args),
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=make_scorer(task, data["validation"], tokenizer),
        callbacks=[EarlyStoppingCallback(args.patience), SaveOnInterrupt()],
    )
    if args.method == "residual":  # Seq2SeqTrainer does not accept this argument of Trainer
        trainer.optimizer_cls_and_kwargs = (ResidualOptimizerFactory, rates)
    return trainer


def collect_scores(args: Arguments, task: Task, trainer: Seq2SeqTrainer, test: dict[str, float]) -> dict:
    """Collect the scores of each epoch, of the best epoch, and of the test split."""
    names = ("loss", *task.metrics)
    epochs = [
        {"epoch": entry["epoch"], "step": entry["step"], **{name: entry[f"eval_{name}"] for name in names}}
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    ]
    best = next(entry for entry in epochs if entry["step"] == trainer.state.best_global_step)
    test = {name: test[f"test_{name}"] for name in names}
    return {"arguments": asdict(args), "epochs": epochs, "best": best, "test": test}


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    task = find_task(args.task).selected_by(args.metric)
    if args.output_dir.exists() and not (args.overwrite or args.resume_from_checkpoint):
        sys.exit(f"--output_dir {args.output_dir} exists. Choose another folder, or pass --overwrite.")
    transformers.logging.set_verbosity_error()
    set_seed(args.seed)

    # Data, model, config
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_data(args, task, tokenizer)
    trainer = make_trainer(args, task, data, tokenizer)

    # Train
    checkpoint = args.resume_from_checkpoint
    if not checkpoint:
        for old in args.output_dir.glob("checkpoint-*"):
            shutil.rmtree(old)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        exit_with_command(args.output_dir)

    # Evaluate
    trainer.compute_metrics = make_scorer(task, data["test"], tokenizer)
    scores = collect_scores(args, task, trainer, trainer.predict(data["test"]).metrics)

    # Save
    trainer.model.save_pretrained(args.output_dir / "trained")
    if args.method == "residual":
        save_as_prompt_tuning(trainer.model, args.output_dir / "merged", overwrite=True)
    report(args.output_dir, f"{args.task}, {args.method}", task.metrics, scores)
    print(f"\n{args.task}, {args.method}: epoch {scores['best']['epoch']:g} of {len(scores['epochs'])} is the best")
    for name in task.metrics:
        print(f"{name:>20}: validation {scores['best'][name]:.4f}, test {scores['test'][name]:.4f}")
    print(f"written to {args.output_dir}: {', '.join(sorted(path.name for path in args.output_dir.iterdir()))}")


if __name__ == "__main__":
    main()
