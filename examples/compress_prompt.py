"""Train a few virtual tokens to do what a long system prompt does, for a fraction of its tokens.

    python examples/compress_prompt.py --text prompt.txt --dataset messages
    python examples/smoke.py compress_prompt.py    # a tiny model and a few messages, offline

The model that reads the text teaches the same model with the virtual tokens: it answers the messages, and the virtual
tokens are trained so that both give the same probabilities to each token of those answers (Kullback-Leibler
divergence). Messages need no answers. A tenth of them is kept for testing.

The teacher is an adapter too: a prompt that consists of the text's own embeddings is the text.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from torch.utils.benchmark import Timer
from tqdm.auto import tqdm, trange
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, get_linear_schedule_with_warmup

from peft_residual import ResidualPromptTuningConfig, create_residual_optimizer, save_as_prompt_tuning
from peft_residual.training import distillation_loss


COMPARED_TOKENS = 20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder or a Hub id")
    parser.add_argument(
        "--text", type=Path, default=Path(__file__).with_name("system_prompt.txt"), help="file with the system prompt"
    )
    parser.add_argument("--dataset", default="CogComp/trec", help="messages: a folder or a Hub id")
    parser.add_argument("--text_column", default="text", help="column with a user's message")
    parser.add_argument("--num_messages", type=int, default=500, help="messages to use, a tenth of them for testing")
    parser.add_argument("--num_virtual_tokens", type=int, default=30, help="length of the compressed prompt")
    parser.add_argument("--max_steps", type=int, default=150, help="training steps")
    parser.add_argument("--batch_size", type=int, default=8, help="messages per step")
    parser.add_argument("--answer_tokens", type=int, default=32, help="length of the teacher's answers")
    parser.add_argument("--seed", type=int, default=0, help="of the network and the order of messages")
    parser.add_argument("--output_dir", type=Path, default=Path("build/compressed"), help="output folder")
    return parser.parse_args()


def load_messages(args: argparse.Namespace) -> list[str]:
    """Load different messages in random order."""
    rows = load_dataset(args.dataset)["train"]
    if args.text_column not in rows.column_names:
        sys.exit(f"{args.dataset} has no column {args.text_column!r}, it has {rows.column_names}. See --help.")
    messages = list(dict.fromkeys(rows.shuffle(seed=args.seed)[args.text_column]))[: args.num_messages]
    if len(messages) < 10:
        sys.exit(f"{args.dataset} has {len(messages)} different messages; at least 10 are needed.")
    return messages


def render(tokenizer: Any, text: str, messages: list[str]) -> tuple[str, list[str]]:
    """Format the system prompt, which the virtual tokens replace, and what follows it for each message."""
    if tokenizer.chat_template is None:
        return f"{text}\n", [f"{message}\n" for message in messages]
    system = [{"role": "system", "content": text}]
    front = tokenizer.apply_chat_template(system, tokenize=False)
    chats = [[*system, {"role": "user", "content": message}] for message in messages]
    whole = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    if not all(one.startswith(front) for one in whole):
        sys.exit("The chat template does not put the system prompt first, so it cannot be replaced by virtual tokens.")
    return front, [one[len(front) :] for one in whole]


@torch.no_grad()
def answer(model: PeftModel, tokenizer: Any, texts: list[str], new_tokens: int, batch_size: int) -> list[list[int]]:
    """Generate an answer to each text, greedily. The token that ends it is part of it."""
    found = []
    for start in trange(0, len(texts), batch_size, desc="answering", leave=False):
        some = texts[start : start + batch_size]
        batch = tokenizer(some, padding=True, add_special_tokens=False, return_tensors="pt").to(model.device)
        output = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            found.append(row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row)
    return found


def loss_of(model: PeftModel, tokenizer: Any, rows: list[tuple[str, list[int]]], student: str | None) -> torch.Tensor:
    """Compare an adapter, or the model without one, with the adapter "text" on texts with their answers."""
    features = []
    for text, reply in rows:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        features.append({"input_ids": ids + reply, "labels": [-100] * len(ids) + reply})
    batch = DataCollatorForSeq2Seq(tokenizer)(features).to(model.device)
    return distillation_loss(model, batch, teacher="text", student=student)


def train(model: PeftModel, tokenizer: Any, rows: list[tuple[str, list[int]]], args: argparse.Namespace) -> None:
    """Train the adapter "compressed" to predict as the adapter "text" does."""
    model.set_adapter("compressed")
    optimizer = create_residual_optimizer(model)  # with rates that suit the adapter
    scheduler = get_linear_schedule_with_warmup(optimizer, args.max_steps // 20, args.max_steps)
    order = torch.Generator().manual_seed(args.seed)
    model.train()
    with trange(args.max_steps, desc="training") as steps:
        for _ in steps:
            chosen = torch.randperm(len(rows), generator=order)[: args.batch_size].tolist()
            loss = loss_of(model, tokenizer, [rows[i] for i in chosen], "compressed")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            steps.set_postfix(divergence=f"{loss.item():.3f}")
    model.eval()


@torch.no_grad()
def evaluate(model: PeftModel, tokenizer: Any, rows: list[tuple[str, list[int]]], student: str | None) -> dict:
    """Compare with the teacher: divergence per message, and the first tokens of the student's own answers."""
    losses = [loss_of(model, tokenizer, [row], student).item() for row in rows]
    with model.disable_adapter() if student is None else contextlib.nullcontext():
        own = answer(model, tokenizer, [text for text, _ in rows], COMPARED_TOKENS, 8)
    same = [
        i < len(reply) and reply[i] == token
        for reply, (_, wanted) in zip(own, rows, strict=True)
        for i, token in enumerate(wanted[:COMPARED_TOKENS])
    ]
    return {"divergence": statistics.mean(losses), "same of the first tokens": statistics.mean(same)}


def main() -> None:
    args = parse_args()
    if args.output_dir.exists():
        sys.exit(f"--output_dir {args.output_dir} exists. Choose another folder.")
    if not args.text.is_file():
        sys.exit(f"--text {args.text} is not a file. Write the system prompt to one.")

    # Data
    messages = load_messages(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    front, texts = render(tokenizer, args.text.read_text().strip(), messages)

    # Model: the text itself as a prompt, its beginning for comparison, and the prompt that is trained from there
    text = {"task_type": "CAUSAL_LM", "tokenizer_name_or_path": args.model}
    text |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": front}
    units = {"encoder_scale": None, "encoder_norm_first": True, "encoder_zero_init": True, "encoder_hidden_size": 128}
    plain = {**text, "encoder_reparameterization_type": "NONE"}
    whole = ResidualPromptTuningConfig(**plain, num_virtual_tokens=None)
    if not 0 < args.num_virtual_tokens < whole.num_virtual_tokens:
        sys.exit(f"--num_virtual_tokens must be below the {whole.num_virtual_tokens} tokens of {args.text}.")
    torch.manual_seed(args.seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(args.model), whole, adapter_name="text")
    warnings.filterwarnings("ignore", message=".* of which the first .* are used")  # as intended here
    for name, fields in (("beginning", plain), ("compressed", {**text, **units})):
        model.add_adapter(name, ResidualPromptTuningConfig(**fields, num_virtual_tokens=args.num_virtual_tokens))
    model.eval()

    # The teacher answers
    model.enable_prompt_cache()  # reads the text once
    answers = answer(model, tokenizer, texts, max(args.answer_tokens, COMPARED_TOKENS), args.batch_size)
    rows = list(zip(texts, answers, strict=True))
    tested = rows[: len(rows) // 10]

    # Train
    train(model, tokenizer, rows[len(tested) :], args)

    # Evaluate
    students = {"nothing": None, "the text's beginning": "beginning", "compressed": "compressed"}
    results = {name: evaluate(model, tokenizer, tested, student) for name, student in tqdm(students.items())}
    model.disable_prompt_cache()
    results["tokens"] = {"text": whole.num_virtual_tokens, "compressed": args.num_virtual_tokens}
    message = tokenizer(texts[0], add_special_tokens=False, return_tensors="pt").to(model.device)
    timer = Timer("model(**message)", globals=locals(), num_threads=torch.get_num_threads())
    results["seconds to read a message"] = {}
    for name in ("text", "compressed"):
        model.set_adapter(name)
        with torch.no_grad():
            results["seconds to read a message"][name] = timer.timeit(5).mean
    print(json.dumps(results, indent=2))

    # Save
    adapter, merged = args.output_dir / "adapter", args.output_dir / "merged"
    model.save_pretrained(adapter, selected_adapters=["compressed"])
    save_as_prompt_tuning(model, merged, adapter_name="compressed")
    print(f"\nadapter to train on: {adapter / 'compressed'}\nmerged: {merged}")
    loading = f"AutoModelForCausalLM.from_pretrained({args.model!r})"
    print(f"to reload with PEFT alone:\n    model = PeftModel.from_pretrained({loading}, {str(merged)!r})")


if __name__ == "__main__":
    main()
