"""A causal language model that answers: the loss is on the answer only, the evaluation generates.

    python examples/causal_lm.py              # AG News; downloads model and data
    python examples/causal_lm.py --smoke      # tiny, offline

`sft.py` does the same with TRL.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import smoke
import torch
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
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
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


@dataclass
class AnswerArguments(Arguments):
    """What to train on what."""

    model: str = field(default="HuggingFaceTB/SmolLM2-135M", metadata={"help": "A folder or a Hub id."})
    dataset: str = field(default="fancyzhx/ag_news", metadata={"help": "A folder with a file per split, or a Hub id."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    label_column: str = field(default="label", metadata={"help": "Column with the class ids."})
    label_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes, if the data has none."}
    )
    question: str = field(default="\nTopic:", metadata={"help": "What stands between the text and the answer."})
    learning_rate: float = field(default=0.03, metadata={"help": "Learning rate of prompt and network."})
    output_dir: Path = field(default=Path("build/causal_lm"), metadata={"help": "Output folder."})


def load_data(args: AnswerArguments) -> DatasetDict:
    """The splits train, validation and test, with the columns prompt and completion."""
    if args.smoke:
        data = smoke.news()
    else:
        data = load_dataset(args.dataset)
        if "validation" not in data:
            parts = data["train"].train_test_split(0.01, seed=args.seed)
            data = DatasetDict(train=parts["train"], validation=parts["test"], test=data["test"])
    check_columns(data, [args.text_column, args.label_column])
    names = label_names(data, args.label_column, args.label_names)

    def write(row):
        return {"prompt": row[args.text_column] + args.question, "completion": f" {names[row[args.label_column]]}"}

    return data.map(write, remove_columns=data["train"].column_names)


@torch.no_grad()
def answers(model, tokenizer, rows, batch_size: int) -> list[str]:
    """What the model generates for each row's prompt."""
    model.eval()
    tokenizer.padding_side = "left"  # new tokens are written behind the text
    texts = []
    for start in tqdm(range(0, len(rows), batch_size), desc="Generating"):
        batch = tokenizer(rows[start : start + batch_size]["prompt"], padding=True, return_tensors="pt")
        output = model.generate(**batch.to(model.device), max_new_tokens=8, do_sample=False)
        texts += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def exact_match(model, tokenizer, rows, batch_size: int) -> float:
    """The share of rows whose generated answer is the right one."""
    given = answers(model, tokenizer, rows, batch_size)
    return sum(a.strip() == row["completion"].strip() for a, row in zip(given, rows, strict=True)) / len(rows)


def main() -> None:
    args = parse(AnswerArguments)
    make_output_dir(args)
    if args.smoke:
        args.model = smoke.tiny_llama(args.output_dir / "tiny-model")

    # Data
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_data(args)

    def tokenize(row):
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        room = room_for_text(tokenizer, args) - len(answer)
        question = tokenizer(row["prompt"])["input_ids"][-room:]  # the end of a long text, with the question
        return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}

    tokens = data.map(tokenize, remove_columns=data["train"].column_names)

    # Model
    base = AutoModelForCausalLM.from_pretrained(args.model)

    # Config
    config = ResidualPromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=args.num_virtual_tokens,
        tokenizer_name_or_path=args.model,
        prompt_tuning_init_seed=args.seed,
    )
    model = get_peft_model(base, config)
    disable_base_dropout(model)
    model.print_trainable_parameters()

    # Train
    trainer = Trainer(
        model,
        TrainingArguments(**training_arguments(args)),
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[TrainingSetupCallback(room_for_text(tokenizer, args))],
        optimizer_cls_and_kwargs=(ResidualOptimizerFactory, {"learning_rate": args.learning_rate}),
    )
    trainer.train()

    # Evaluate
    rows = data["test"].shuffle(seed=args.seed).select(range(min(1000, len(data["test"]))))
    print(f"\ntest exact match: {exact_match(model, tokenizer, rows, 2 * args.batch_size):.1%}")

    # Save, merge
    adapter, merged = args.output_dir / "adapter", args.output_dir / "merged"
    model.save_pretrained(adapter)
    save_as_prompt_tuning(model, merged)
    print_saved(adapter, merged, f"AutoModelForCausalLM.from_pretrained({args.model!r})")


if __name__ == "__main__":
    main()
