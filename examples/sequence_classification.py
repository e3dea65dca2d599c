"""Sequence classification with BERT: a residual prompt in front of the text, and a head that is trained along.

python examples/sequence_classification.py              # SST-2; downloads model and data
python examples/sequence_classification.py --smoke      # tiny, offline
"""

from __future__ import annotations

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
from datasets import DatasetDict, load_dataset
from peft import get_peft_model
from sklearn.metrics import accuracy_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
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
class ClassificationArguments(Arguments):
    """What to train on what."""

    model: str = field(default="google-bert/bert-base-uncased", metadata={"help": "A folder or a Hub id."})
    dataset: str = field(default="nyu-mll/glue", metadata={"help": "A folder with a file per split, or a Hub id."})
    subset: str | None = field(default="sst2", metadata={"help": "Configuration of a data set on the Hub."})
    text_column: str = field(default="sentence", metadata={"help": "Column with the text."})
    label_column: str = field(default="label", metadata={"help": "Column with the class ids."})
    label_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes, if the data has none."}
    )
    learning_rate: float = field(default=0.03, metadata={"help": "Learning rate of prompt and network."})
    head_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the head."})
    output_dir: Path = field(default=Path("build/sequence_classification"), metadata={"help": "Output folder."})


def load_data(args: ClassificationArguments) -> DatasetDict:
    if args.smoke:
        return smoke.reviews()
    data = load_dataset(args.dataset, args.subset)
    # The labels of GLUE's test splits are hidden: one half of its validation split chooses, the other is reported on.
    halves = data["validation"].train_test_split(0.5, seed=args.seed)
    return DatasetDict(train=data["train"], validation=halves["train"], test=halves["test"])


def main() -> None:
    args = parse(ClassificationArguments)
    make_output_dir(args)
    if args.smoke:
        args.model = smoke.tiny_bert(args.output_dir / "tiny-model")

    # Data
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_data(args)
    check_columns(data, [args.text_column, args.label_column])
    names = label_names(data, args.label_column, args.label_names)
    # BERT's vocabulary begins with a thousand unused rows: which words are common must be counted.
    common = most_common_token_ids(data["train"][:10_000][args.text_column], tokenizer)

    def tokenize(rows):
        inputs = tokenizer(rows[args.text_column], truncation=True, max_length=room_for_text(tokenizer, args))
        return {**inputs, "labels": rows[args.label_column]}

    data = data.map(tokenize, batched=True, remove_columns=data["train"].column_names)

    # Model
    base = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=len(names), id2label=dict(enumerate(names))
    )

    # Config
    config = ResidualPromptTuningConfig(
        task_type="SEQ_CLS",  # PEFT trains and saves the classifier too
        num_virtual_tokens=args.num_virtual_tokens,
        tokenizer_name_or_path=args.model,  # so that its special and unused tokens are not drawn
        prompt_tuning_init_token_ids=common,
        prompt_tuning_init_seed=args.seed,
    )
    model = get_peft_model(base, config)
    disable_base_dropout(model)
    model.print_trainable_parameters()

    # Train
    trainer = Trainer(
        model,
        TrainingArguments(**training_arguments(args), metric_for_best_model="accuracy"),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": accuracy_score(p.label_ids, p.predictions.argmax(-1))},
        callbacks=[TrainingSetupCallback(room_for_text(tokenizer, args))],
        optimizer_cls_and_kwargs=(
            ResidualOptimizerFactory,
            {"learning_rate": args.learning_rate, "modules_to_save_learning_rate": args.head_learning_rate},
        ),
    )
    trainer.train()

    # Evaluate
    print(f"\ntest accuracy: {trainer.evaluate(data['test'])['eval_accuracy']:.1%}")

    # Save, merge
    adapter, merged = args.output_dir / "adapter", args.output_dir / "merged"
    model.save_pretrained(adapter)
    save_as_prompt_tuning(model, merged)
    print_saved(
        adapter,
        merged,
        f"AutoModelForSequenceClassification.from_pretrained({args.model!r}, num_labels={len(names)})",
    )


if __name__ == "__main__":
    main()
