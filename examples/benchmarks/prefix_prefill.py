"""Time a causal model's prefill behind a prompt: PEFT prompt tuning against the exported prefix, in turns, one run.

The text alone, without any prompt, is timed too: no way to serve a prompt can take less.

    python examples/benchmarks/prefix_prefill.py
    python examples/benchmarks/prefix_prefill.py --prompt 20 --text 64 --threads 1
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_residual import ResidualPromptTuningConfig, save_as_prefix_tuning, save_as_prompt_tuning


def build_models(options: argparse.Namespace, folder: str) -> dict[str, PeftModel]:
    """One residual prompt, exported twice and loaded with stock PEFT, and live with its keys and values kept."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    base = LlamaForCausalLM(config).eval()
    prompt_config = ResidualPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=options.prompt)
    model = get_peft_model(copy.deepcopy(base), prompt_config)
    prompt = PeftModel.from_pretrained(copy.deepcopy(base), save_as_prompt_tuning(model, f"{folder}/prompt"))
    prefix = PeftModel.from_pretrained(copy.deepcopy(base), save_as_prefix_tuning(model, f"{folder}/prefix"))
    model.enable_prompt_cache()
    models = {
        "prompt tuning, PEFT": prompt,
        "exported prefix, PEFT": prefix,
        "prompt cache": model,
        "text alone": base,
    }
    return {name: model.eval().requires_grad_(False) for name, model in models.items()}


def milliseconds(run: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def main() -> None:
    """Parse the options, check that both compute the same, time them, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=100, help="virtual tokens, P (default %(default)s)")
    parser.add_argument("--text", type=int, default=12, help="input tokens (default %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="hidden size of the Llama (default %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="layers of the Llama (default %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="words of the Llama (default %(default)s)")
    parser.add_argument(
        "--last_logits", action="store_true", help="logits of the last token only, as in generation; else of all"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=30, help="timed passes of each (default %(default)s)")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        models = build_models(options, folder)
    ids = torch.randint(3, options.vocabulary, (1, options.text))
    kept = {name: {"logits_to_keep": 1} if options.last_logits else {} for name in models}
    if not options.last_logits:  # what the others, but for prompt tuning, give anyway
        kept["prompt cache"] = {"logits_to_keep": options.text}
    logits = {name: model(input_ids=ids, **kept[name]).logits[:, -options.text :] for name, model in models.items()}
    expected = logits["prompt tuning, PEFT"]
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(options.repeats + 3):
        for name, model in models.items():
            time_taken = milliseconds(lambda model=model, name=name: model(input_ids=ids, **kept[name]))
            if repeat >= 3:  # the first passes allocate
                times[name].append(time_taken)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {options.repeats}, milliseconds")
    print(f"Llama, {options.layers} layers of {options.width}; {options.prompt} virtual, {options.text} input tokens")
    print(f"{options.vocabulary} words, logits of {'the last token' if options.last_logits else 'all tokens'}")
    for name, taken in times.items():
        ratio = statistics.median(times["prompt tuning, PEFT"]) / statistics.median(taken)
        print(f"  {name:<22}{statistics.median(taken):9.2f}   (fastest {min(taken):.2f})   ratio {ratio:.1f}")
    difference = max(((logits[n] - expected).abs().max() / expected.abs().max()).item() for n in list(times)[1:3])
    print(f"  logits, relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
