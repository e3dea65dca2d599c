"""Token classification with BERT: which words name a person, an organisation, a place.

python examples/token_classification.py              # CoNLL-2003; downloads model and data
python examples/token_classification.py --smoke      # tiny, offline
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import smoke
from common import (
    Arguments,
    check_columns,
    label_names,
    make_output_dir,
    parse,
    print_saved,
    room_for_text,
    training_arguments,
)
from datasets import load_dataset
from peft import get_peft_model
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


@dataclass
class TaggingArguments(Arguments):
    """What to train on what."""

    model: str = field(default="google-bert/bert-base-uncased", metadata={"help": "A folder or a Hub id."})
    dataset: str = field(
        default="tomaarsen/conll2003", metadata={"help": "A folder with a file per split, or a Hub id."}
    )
    words_column: str = field(default="tokens", metadata={"help": "Column with the list of words."})
    tags_column: str = field(default="ner_tags", metadata={"help": "Column with the list of tag ids."})
    label_names: list[str] | None = field(default=None, metadata={"help": "Names of the tags, if the data has none."})
    learning_rate: float = field(default=0.03, metadata={"help": "Learning rate of prompt and network."})
    head_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the head."})
    output_dir: Path = field(default=Path("build/token_classification"), metadata={"help": "Output folder."})


def at_first_pieces(tags: list[int], words: list[int | None]) -> list[int]:
    """The tag of each word at its first piece; -100 (not counted) at other pieces and special tokens.

    `words` says of each piece which word it belongs to, None for special tokens.
    """
    before = [None, *words]
    return [tags[word] if word is not None and word != before[i] else -100 for i, word in enumerate(words)]


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """Start, end and kind of each entity in a row of tags such as B-PER, I-PER, O."""
    found, start = set(), None
    for i, tag in enumerate([*tags, "O"]):
        if start is not None and tag != f"I-{tags[start][2:]}":
            found.add((start, i, tags[start][2:]))
            start = None
        if tag.startswith("B-") or (tag.startswith("I-") and start is None):
            start = i
    return found


def entity_f1(prediction, names: list[str]) -> dict[str, float]:
    """F1 over whole entities: start, end and kind must be right."""
    right = guessed = true = 0
    for logits, labels in zip(prediction.predictions, prediction.label_ids, strict=True):
        counted = labels != -100
        gold = entities([names[i] for i in labels[counted]])
        guess = entities([names[i] for i in logits.argmax(-1)[counted]])
        right, guessed, true = right + len(gold & guess), guessed + len(guess), true + len(gold)
    return {"f1": 2 * right / max(1, guessed + true)}


def main() -> None:
    args = parse(TaggingArguments)
    make_output_dir(args)
    if args.smoke:
        args.model = smoke.tiny_bert(args.output_dir / "tiny-model")

    # Data
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if not tokenizer.is_fast:
        sys.exit(f"The tokenizer of --model {args.model} does not say which word a piece is of. Use a fast one.")
    data = smoke.named_entities() if args.smoke else load_dataset(args.dataset)
    check_columns(data, [args.words_column, args.tags_column])
    names = label_names(data, args.tags_column, args.label_names)
    common = most_common_token_ids(map(" ".join, data["train"][:10_000][args.words_column]), tokenizer)

    def tokenize(rows):
        length = room_for_text(tokenizer, args)
        inputs = tokenizer(rows[args.words_column], is_split_into_words=True, truncation=True, max_length=length)
        labels = [at_first_pieces(tags, inputs.word_ids(i)) for i, tags in enumerate(rows[args.tags_column])]
        return {**inputs, "labels": labels}

    data = data.map(tokenize, batched=True, remove_columns=data["train"].column_names)

    # Model
    base = AutoModelForTokenClassification.from_pretrained(
        args.model, num_labels=len(names), id2label=dict(enumerate(names))
    )

    # Config
    config = ResidualPromptTuningConfig(
        task_type="TOKEN_CLS",  # PEFT trains and saves the classifier too
        num_virtual_tokens=args.num_virtual_tokens,
        tokenizer_name_or_path=args.model,
        prompt_tuning_init_token_ids=common,
        prompt_tuning_init_seed=args.seed,
    )
    model = get_peft_model(base, config)
    disable_base_dropout(model)
    model.print_trainable_parameters()

    # Train
    trainer = Trainer(
        model,
        TrainingArguments(**training_arguments(args), metric_for_best_model="f1"),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=lambda prediction: entity_f1(prediction, names),
        callbacks=[TrainingSetupCallback(room_for_text(tokenizer, args))],
        optimizer_cls_and_kwargs=(
            ResidualOptimizerFactory,
            {"learning_rate": args.learning_rate, "modules_to_save_learning_rate": args.head_learning_rate},
        ),
    )
    trainer.train()

    # Evaluate
    print(f"\ntest F1 over entities: {trainer.evaluate(data['test'])['eval_f1']:.1%}")

    # Save, merge
    adapter, merged = args.output_dir / "adapter", args.output_dir / "merged"
    model.save_pretrained(adapter)
    save_as_prompt_tuning(model, merged)
    print_saved(
        adapter, merged, f"AutoModelForTokenClassification.from_pretrained({args.model!r}, num_labels={len(names)})"
    )
    print(f"In stock PEFT its logits begin with the prompt's {args.num_virtual_tokens} positions: cut them off.")


if __name__ == "__main__":
    main()
