"""Token classification with BERT: which words name a person, an organization or a place.

python examples/token_classification.py             # CoNLL-2003; downloads model and data
python examples/smoke.py token_classification.py    # a tiny model and a few rows, offline
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from datasets import DatasetDict, load_dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

from peft_residual import (
    ResidualOptimizerFactory,
    ResidualPromptTuningConfig,
    TrainingSetupCallback,
    disable_base_dropout,
    save_as_prompt_tuning,
)
from peft_residual.initialization import most_common_token_ids


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google-bert/bert-base-uncased", help="a folder or a Hub id")
    parser.add_argument("--dataset", default="tomaarsen/conll2003", help="a folder with a file per split, or a Hub id")
    parser.add_argument("--words_column", default="tokens", help="column with the list of words")
    parser.add_argument("--tags_column", default="ner_tags", help="column with the list of tag ids")
    parser.add_argument("--label_names", nargs="+", help="names of the tags, if the data set has none")
    parser.add_argument("--num_virtual_tokens", type=int, default=10, help="prompt length")
    parser.add_argument("--learning_rate", type=float, default=0.03, help="of the prompt and its network")
    parser.add_argument("--head_learning_rate", type=float, default=1e-3, help="of the classification head")
    parser.add_argument("--max_steps", type=int, default=1000, help="training steps")
    parser.add_argument("--batch_size", type=int, default=32, help="rows per training step")
    parser.add_argument("--seed", type=int, default=0, help="of the prompt, its network and the order of rows")
    parser.add_argument("--output_dir", type=Path, default=Path("build/token_classification"), help="output folder")
    return parser.parse_args()


def check_columns(data: DatasetDict, columns: list[str]) -> None:
    """Stop if a split lacks a column."""
    for split, rows in data.items():
        for column in columns:
            if column not in rows.column_names:
                sys.exit(f"Split {split!r} has no column {column!r}, it has {rows.column_names}. See --help.")


def label_names(data: DatasetDict, column: str, given: list[str] | None) -> list[str]:
    """Return the names of the tags, given or from the data set. Stop if a row has a tag without a name."""
    names = given or getattr(data["train"].features[column].feature, "names", None)
    if not names:
        sys.exit(f"Column {column!r} has no names for its tags. Pass --label_names, one per tag.")
    for split, rows in data.items():
        for row, tags in enumerate(rows[column]):
            if not set(tags) <= set(range(len(names))):
                known = f"expected 0 to {len(names) - 1}: {names}"
                sys.exit(f"Row {row} of split {split!r} has tags {tags}, {known}. Pass --label_names, one per tag.")
    return names


def at_first_pieces(tags: list[int], words: list[int | None]) -> list[int]:
    """Put the tag of each word at its first token; other tokens and special tokens get -100, which is ignored.

    `words` has the index of the word that each token belongs to, None for special tokens.
    """
    before = [None, *words]
    return [tags[word] if word is not None and word != before[i] else -100 for i, word in enumerate(words)]


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """Find the entities in a row of tags such as B-PER, I-PER, O: start, end and type of each."""
    found, start = set(), None
    for i, tag in enumerate([*tags, "O"]):
        if start is not None and tag != f"I-{tags[start][2:]}":
            found.add((start, i, tags[start][2:]))
            start = None
        if tag.startswith("B-") or (tag.startswith("I-") and start is None):
            start = i
    return found


def entity_f1(prediction, names: list[str]) -> dict[str, float]:
    """Compute the F1 score over entities: start, end and type must be correct."""
    correct = predicted = true = 0
    for logits, labels in zip(prediction.predictions, prediction.label_ids, strict=True):
        counted = labels != -100
        gold = entities([names[i] for i in labels[counted]])
        found = entities([names[i] for i in logits.argmax(-1)[counted]])
        correct, predicted, true = correct + len(gold & found), predicted + len(found), true + len(gold)
    return {"f1": 2 * correct / max(1, predicted + true)}


def main() -> None:
    args = parse_args()
    if args.output_dir.exists():
        sys.exit(f"--output_dir {args.output_dir} exists. Choose another folder.")

    # Data
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    longest = min(tokenizer.model_max_length, 512)
    max_length = longest - args.num_virtual_tokens  # of a text, so that the prompt still fits
    if args.num_virtual_tokens >= longest // 2:
        sys.exit(f"--num_virtual_tokens {args.num_virtual_tokens} leaves no room for text in {longest} tokens.")
    data = load_dataset(args.dataset)
    check_columns(data, [args.words_column, args.tags_column])
    names = label_names(data, args.tags_column, args.label_names)
    # BERT's token ids are not sorted by frequency, so the most common tokens are counted.
    common_ids = most_common_token_ids(map(" ".join, data["train"][:10_000][args.words_column]), tokenizer)

    def tokenize(rows):
        inputs = tokenizer(rows[args.words_column], is_split_into_words=True, truncation=True, max_length=max_length)
        labels = [at_first_pieces(tags, inputs.word_ids(i)) for i, tags in enumerate(rows[args.tags_column])]
        return {**inputs, "labels": labels}

    data = data.map(tokenize, batched=True, remove_columns=data["train"].column_names)
    collator = DataCollatorForTokenClassification(tokenizer)

    # Model
    base = AutoModelForTokenClassification.from_pretrained(
        args.model, num_labels=len(names), id2label=dict(enumerate(names))
    )

    # Config
    config = ResidualPromptTuningConfig(
        task_type="TOKEN_CLS",  # PEFT also trains and saves the classification head
        num_virtual_tokens=args.num_virtual_tokens,
        tokenizer_name_or_path=args.model,  # its special and unused tokens are left out of the initialization
        prompt_tuning_init_token_ids=common_ids,
        prompt_tuning_init_seed=args.seed,
    )
    model = get_peft_model(base, config)
    disable_base_dropout(model)
    model.print_trainable_parameters()

    # Train
    training_args = TrainingArguments(
        output_dir=str(args.output_dir / "trainer"),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=4 * args.batch_size,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=0.2,  # of all steps
        save_steps=0.2,
        save_total_limit=2,
        logging_steps=0.2,
        load_best_model_at_end=True,
        metric_for_best_model="f1",
        seed=args.seed,
        report_to=[],
    )
    rates = {"learning_rate": args.learning_rate, "modules_to_save_learning_rate": args.head_learning_rate}
    trainer = Trainer(
        model,
        training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=collator,
        compute_metrics=lambda prediction: entity_f1(prediction, names),
        callbacks=[TrainingSetupCallback(max_length)],
        optimizer_cls_and_kwargs=(ResidualOptimizerFactory, rates),
    )
    trainer.train()

    # Evaluate
    print(f"\ntest F1 over entities: {trainer.evaluate(data['test'])['eval_f1']:.1%}")

    # Save: the adapter, and the projected prompt alone, which PEFT loads without this package
    adapter, merged = args.output_dir / "adapter", args.output_dir / "merged"
    model.save_pretrained(adapter)
    save_as_prompt_tuning(model, merged)
    print(f"\nadapter to train on: {adapter}\nmerged: {merged}")

    # Reload
    base = AutoModelForTokenClassification.from_pretrained(args.model, num_labels=len(names))
    reloaded = PeftModel.from_pretrained(base, merged).eval()
    batch = collator([data["test"][0]])
    with torch.no_grad():
        logits = reloaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    tags = logits[0, args.num_virtual_tokens :].argmax(
        -1
    )  # with PEFT alone, the logits include the prompt's positions
    print("first prediction after reloading:", " ".join(names[i] for i in tags[batch["labels"][0] != -100].tolist()))
    loading = f"AutoModelForTokenClassification.from_pretrained({args.model!r}, num_labels={len(names)})"
    print(f"to reload with PEFT alone:\n    model = PeftModel.from_pretrained({loading}, {str(merged)!r})")


if __name__ == "__main__":
    main()
