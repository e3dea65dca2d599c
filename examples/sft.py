"""The task of `causal_lm.py` with TRL's SFTTrainer, which takes the config and builds the model itself.

python examples/sft.py              # AG News; downloads model and data
python examples/sft.py --smoke      # tiny, offline
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import smoke
import torch
from causal_lm import AnswerArguments, exact_match, load_data
from common import make_output_dir, parse, print_saved, room_for_text, training_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_residual import (
    ResidualOptimizerFactory,
    ResidualPromptTuningConfig,
    TrainingSetupCallback,
    disable_base_dropout,
    save_as_prompt_tuning,
)


@dataclass
class SFTArguments(AnswerArguments):
    """What to train on what."""

    output_dir: Path = field(default=Path("build/sft"), metadata={"help": "Output folder."})


def main() -> None:
    args = parse(SFTArguments)
    make_output_dir(args)
    if args.smoke:
        args.model = smoke.tiny_llama(args.output_dir / "tiny-model")

    # Data: TRL tokenizes the columns prompt and completion, and puts the loss on the completion.
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_data(args)

    # Model
    base = AutoModelForCausalLM.from_pretrained(args.model)

    # Config
    config = ResidualPromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=args.num_virtual_tokens,
        tokenizer_name_or_path=args.model,
        prompt_tuning_init_seed=args.seed,
    )

    # Train
    trainer = SFTTrainer(
        base,
        SFTConfig(
            **training_arguments(args),
            max_length=room_for_text(tokenizer, args),
            packing=False,  # a prompt can stand in front of one text only, so packed rows are refused
            padding_free=False,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),  # TRL's default is on, on a CPU too
        ),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[TrainingSetupCallback(room_for_text(tokenizer, args))],
        optimizer_cls_and_kwargs=(ResidualOptimizerFactory, {"learning_rate": args.learning_rate}),
    )
    model = trainer.model
    disable_base_dropout(model)
    model.print_trainable_parameters()
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
