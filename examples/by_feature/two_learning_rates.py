"""One learning rate for the prompt embedding and another one for the network.

    python examples/by_feature/two_learning_rates.py [--smoke]

The Trainer only logs the learning rate of the first parameter group; a callback logs all of them. `Trainer` (not
`Seq2SeqTrainer`) can create the same optimizer itself, with
`optimizer_cls_and_kwargs=(ResidualOptimizerFactory, {"learning_rate": 0.3, "encoder_learning_rate": 0.01})`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from base import TaskArguments, base_code, load_data, load_merged, make_config, make_trainer, test_score
from common import make_output_dir, parse, print_saved
from peft import get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, TrainerCallback

from peft_residual import create_residual_optimizer, disable_base_dropout, save_as_prompt_tuning


@dataclass
class RatesArguments(TaskArguments):
    """What to train, and on which data."""

    # New: the learning rate of the network
    encoder_learning_rate: float = field(default=0.01, metadata={"help": "Learning rate of the network."})
    output_dir: Path = field(default=Path("build/by_feature/two_learning_rates"), metadata={"help": "Output folder."})


# New: the scheduler scales the rate of each group, so both are logged
class LogRates(TrainerCallback):
    """Print the learning rate of each group, and add it to `trainer.state.log_history`."""

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        if state.global_step % state.logging_steps == 0:
            rates = {f"learning_rate_{group['name']}": group["lr"] for group in optimizer.param_groups}
            state.log_history.append({"step": state.global_step, **rates})
            print(f"\nstep {state.global_step}:", ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items()))


def main() -> None:
    args = parse(RatesArguments)
    make_output_dir(args)

    # Data
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_data(args, tokenizer, args.task)

    # Model, config
    base = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
    model = get_peft_model(base, make_config(args))
    disable_base_dropout(model)

    # Train
    # New: an optimizer with a parameter group for each part
    optimizer = create_residual_optimizer(
        model, learning_rate=args.learning_rate, encoder_learning_rate=args.encoder_learning_rate
    )
    print("\ngroup               weights  learning rate  weight decay")
    for group in optimizer.param_groups:
        weights = sum(parameter.numel() for parameter in group["params"])
        print(f"{group['name']:18} {weights:>8,} {group['lr']:>14g} {group['weight_decay']:>13g}")
    trainer = make_trainer(args, model, data, tokenizer, optimizer, callbacks=[LogRates()], lr_scheduler_type="linear")
    trainer.train()

    # Evaluate
    print(f"\ntest exact match: {test_score(args, model, data, tokenizer):.1%}")

    # Save: the adapter, and the projected prompt alone, which PEFT loads without this package
    adapter, merged = args.output_dir / "adapter", args.output_dir / "merged"
    model.save_pretrained(adapter)
    save_as_prompt_tuning(model, merged)

    # Reload
    print(f"test exact match after reloading: {test_score(args, load_merged(args, merged), data, tokenizer):.1%}")
    print_saved(adapter, merged, base_code(args))


if __name__ == "__main__":
    main()
