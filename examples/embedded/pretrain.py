"""Pretrain the embedded model from scratch: a small T5, trained on templated English texts.

    python examples/embedded/pretrain.py --output examples/embedded/model --overwrite

takes about 15 minutes on one CPU core. The seed fixes the data, the tokenizer and the initial weights. Since bfloat16
kernels differ between processors, another machine gives a slightly different model of the same quality.
"""

import argparse
import json
import platform
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `embedded`

from embedded.skills import SKILLS, mixture


SPECIAL = ["<pad>", "</s>", "<unk>"]
SENTINELS = ["<extra_id_0>", "<extra_id_1>"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;?!|'-"
MARK = "\u2581"  # stands for the space before a word, as in SentencePiece
MAX_INPUT, MAX_TARGET = 56, 10
EARLY = 0.2  # share of the steps that draw from the early mixture


def build_tokenizer(examples: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word, the most frequent first, and single characters for all other text."""
    counts = Counter(word for pair in examples for text in pair for word in text.split() if word not in SENTINELS)
    words = [MARK + word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    pieces = [*words, *(piece for c in CHARACTERS for piece in (c, MARK + c) if piece not in words), MARK]
    # A word scores higher than its characters, so a known word is never split.
    vocabulary = [(token, 0.0) for token in SPECIAL + SENTINELS]
    vocabulary += [(piece, -1.0 if len(piece) > 2 else -10.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index("<unk>")))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=MARK, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SENTINELS,
        model_max_length=128,
    )


def build_model(vocab_size: int) -> T5ForConditionalGeneration:
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocab_size,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    initialize_for_copying(model)
    return model


@torch.no_grad()
def initialize_for_copying(model: T5ForConditionalGeneration) -> None:
    """Initialize attention for matching and copying, which the relational skills are based on.

    As in mimetic initialization (Trockman and Kolter, 2023), keys equal queries, so that a token attends to equal
    tokens, and outputs are transposed values, so that the attended token is passed on unchanged. In addition, one
    encoder head attends to the previous token and one to the next token: the offsets -1 and +1 are the buckets 1 and
    half + 1 of T5's relative positions.
    """
    for module in model.modules():
        if isinstance(module, T5Attention):
            module.k.weight.copy_(module.q.weight * (module.k.weight.std() / module.q.weight.std()))
            module.o.weight.copy_(module.v.weight.T)
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    bias[1, 0] = bias[model.config.relative_attention_num_buckets // 2 + 1, 1] = 5.0


def build_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Use Muon for matrices and AdamW for all else, with rates that match the scale: T5 embeddings are about 1."""
    matrices, tables, small = [], [], []
    for name, parameter in model.named_parameters():
        if name == "shared.weight":
            tables.append(parameter)
        elif parameter.ndim == 1 or "relative_attention_bias" in name:
            small.append(parameter)
        else:
            matrices.append(parameter)
    others = [{"params": small, "lr": 30 * lr}, {"params": tables, "lr": 100 * lr}]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", ns_steps=3),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, steps: int, warmup: int = 100, constant: float = 0.5) -> float:
    """Return the factor of the learning rates: linear warm-up, constant, linear decay to zero."""
    return min(1.0, (step + 1) / warmup, (steps - step) / ((1 - constant) * steps))


def batches(rng: Random, tokenizer: PreTrainedTokenizerFast, steps: int, batch_size: int, chunk: int = 100):
    """Yield `(inputs, mask, labels)`. Texts of similar length are batched together, so there is little padding."""
    for start in range(0, steps, chunk):
        number = min(chunk, steps - start)
        texts, targets = zip(*mixture(rng, number * batch_size, early=start < EARLY * steps), strict=True)
        sources = tokenizer(list(texts), truncation=True, max_length=MAX_INPUT)["input_ids"]
        answers = tokenizer(list(targets), truncation=True, max_length=MAX_TARGET)["input_ids"]
        # Sort by the length of the answer (most are one word), then by the length of the input.
        order = sorted(range(len(sources)), key=lambda i: (len(answers[i]) > 2, len(sources[i]) + 2 * rng.random()))
        groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            inputs, mask = pad([sources[i] for i in group], 0)
            labels, _ = pad([answers[i] for i in group], -100)
            yield inputs, mask, labels


def pad(rows: list[list[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    padded = torch.tensor([row + [value] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return padded, (torch.arange(width) < lengths[:, None]).long()


@torch.no_grad()
def exact_match(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int, number: int) -> dict:
    """Return the exact match of each skill on new examples."""
    model.eval()
    scores = {}
    for i, (skill, (*_, make)) in enumerate(SKILLS.items()):
        rng = Random(seed + i)
        texts, targets = zip(*(make(rng) for _ in range(number)), strict=True)
        inputs = tokenizer(list(texts), return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=MAX_TARGET, do_sample=False)
        wanted = tokenizer(list(targets), truncation=True, max_length=MAX_TARGET)["input_ids"]
        answers = [[token for token in row if token not in (0, 1)] for row in output.tolist()]
        scores[skill] = sum(a == w[:-1] for a, w in zip(answers, wanted, strict=True)) / number
    return scores


def train(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    rng: Random,
    steps: int,
    batch_size: int,
    lr: float,
    log_every: int = 1000,
) -> None:
    optimizers = build_optimizers(model, lr)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: schedule(step, steps)) for o in optimizers]
    model.train()
    progress, total = tqdm(total=steps, desc="pretraining", mininterval=5), torch.zeros(())
    for step, (inputs, mask, labels) in enumerate(batches(rng, tokenizer, steps, batch_size), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=inputs, attention_mask=mask, labels=labels).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        total += loss.detach()
        if step % log_every == 0:
            tqdm.write(f"step {step}: loss {total.item() / log_every:.4f}, {time.process_time():.0f} CPU seconds")
            weak = {k: v for k, v in exact_match(model, tokenizer, seed=step, number=40).items() if v < 0.9}
            tqdm.write(f"exact match below 90 %: {weak}")
            model.train()
            total.zero_()
        progress.update()
    progress.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model", help="output folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--learning_rate", type=float, default=1e-3, help="learning rate of Muon; the other rates are multiples of it"
    )
    parser.add_argument("--threads", type=int, default=1, help="more threads are faster but use more CPU time")
    parser.add_argument("--evaluate", type=int, default=200, help="new examples per skill")
    args = parser.parse_args()
    if args.output.exists() and not args.overwrite:
        parser.error(f"--output {args.output} exists: name another folder, or pass --overwrite to replace it")

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = Random(args.seed)
    tokenizer = build_tokenizer(mixture(rng, 50_000))
    model = build_model(len(tokenizer))
    train(model, tokenizer, rng, args.steps, args.batch_size, args.learning_rate)

    model = model.to(torch.bfloat16)  # the committed weights are the ones that are scored
    scores = exact_match(model.float(), tokenizer, args.seed + 1_000_000, args.evaluate)
    record = {
        "command": "python examples/embedded/pretrain.py "
        + " ".join(f"--{k} {getattr(args, k)}" for k in ("seed", "steps", "batch_size", "learning_rate", "threads")),
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "cpu_seconds": round(time.process_time()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "exact_match": {skill: round(score, 3) for skill, score in scores.items()},
    }
    save(args.output, model.to(torch.bfloat16), tokenizer, record)
    print(json.dumps(record, indent=2))


def save(output: Path, model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, record: dict) -> None:
    """Write to a new folder and rename it, so that an interrupted run does not damage the old one."""
    draft, old = (output.with_name(f"{output.name}.{ending}") for ending in ("draft", "old"))
    for folder in (draft, old):
        shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.backend_tokenizer.no_truncation()  # otherwise the settings of the last call are saved too
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(draft)
    (draft / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    if output.exists():
        output.rename(old)
    draft.rename(output)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    main()
