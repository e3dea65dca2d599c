"""Time a batch whose rows have different prompts: one call with `adapter_names` against one call for each adapter.

A Llama of width 256 with random weights; every call generates. Both run in turns, and the median is taken.

    python examples/benchmarks/mixed_batch.py
    python examples/benchmarks/mixed_batch.py --new_tokens 1 --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from peft_residual import ResidualPromptTuningConfig


def build_model(adapters: int) -> PeftModel:
    """A frozen base with adapters of different lengths: 5, 10, 15, 20, 5, ..."""
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8000, num_key_value_heads=4, **sizes))
    for number in range(adapters):
        config = ResidualPromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5 + 5 * (number % 4), prompt_tuning_init_seed=number
        )
        if number == 0:
            model = get_peft_model(model, config, adapter_name="0")
        else:
            model.add_adapter(str(number), config)
    model.requires_grad_(False)
    return model.eval()


def main() -> None:
    """Parse the options, check that both give the same, time them, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=8, help="adapters (default %(default)s)")
    parser.add_argument("--rows", type=int, default=64, help="rows in all (default %(default)s)")
    parser.add_argument("--length", type=int, default=12, help="tokens of each row (default %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens to generate (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each (default %(default)s)")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = build_model(options.adapters)
    ids = torch.randint(3, 8000, (options.rows, options.length))
    names = [str(row * options.adapters // options.rows) for row in range(options.rows)]
    settings = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens, "do_sample": False}
    settings |= {"pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}

    def one_call() -> Tensor:
        return model.generate(input_ids=ids, adapter_names=names, **settings).logits[0]

    def call_for_each() -> Tensor:
        parts = []
        for name in dict.fromkeys(names):
            model.set_adapter(name, inference_mode=True)
            rows = ids[[row for row, other in enumerate(names) if other == name]]
            parts.append(model.generate(input_ids=rows, **settings).logits[0])
        return torch.cat(parts)

    difference = (one_call() - call_for_each()).abs().max().item()
    times: dict[str, list[float]] = {"one call": [], "a call for each": []}
    for _ in tqdm(range(options.repeats), desc="calls", leave=False):
        for run, seconds in zip((one_call, call_for_each), times.values(), strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)

    medians = [1e3 * statistics.median(seconds) for seconds in times.values()]
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, median of {options.repeats}, seed 0")
    print(
        f"{options.rows} rows of {options.length} tokens, {options.adapters} adapters, {options.new_tokens} new tokens"
    )
    for name, median in zip(times, medians, strict=True):
        print(f"  {name:16} {median:9.1f} ms")
    print(f"  ratio            {medians[1] / medians[0]:9.1f}")
    print(f"  first logits differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
