"""Measure how far from the vocabulary a prompt is initialized, with and without a LayerNorm at the network's end.

python examples/reproduce/start.py
"""

from __future__ import annotations

import argparse

import torch
from torch.nn.functional import cosine_similarity

from peft_residual import ResidualPromptEncoder, ResidualPromptTuningConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument(
        "--width", type=int, default=3072, help="width of the embeddings; 3072 is that of Llama-3.2-3B"
    )
    parser.add_argument("--scale", type=float, default=0.02, help="standard deviation of the embeddings")
    parser.add_argument("--hidden", type=int, default=800, help="width of the network's hidden layer")
    args = parser.parse_args()

    torch.manual_seed(0)
    table = torch.nn.Embedding(5000, args.width)
    torch.nn.init.normal_(table.weight, std=args.scale)
    print("LayerNorm  norm of a row  of the network's output  cosine of prompt and row  of two outputs")
    for layer_norm in (True, False):
        config = ResidualPromptTuningConfig(
            task_type="CAUSAL_LM",
            token_dim=args.width,
            num_virtual_tokens=args.tokens,
            encoder_hidden_size=args.hidden,
            encoder_layer_norm=layer_norm,
        )
        encoder = ResidualPromptEncoder(config, table)
        with torch.no_grad():
            rows, prompt = encoder.embedding.weight, encoder()
            outputs = prompt - rows
            norms = [tensor.norm(dim=1).mean().item() for tensor in (rows, outputs)]
            cosines = [
                cosine_similarity(*pair, dim=1).mean().item() for pair in ((prompt, rows), (outputs[1:], outputs[:-1]))
            ]
        print(f"{layer_norm!s:>9}  {norms[0]:>13.1f}  {norms[1]:>23.1f}  {cosines[0]:>24.2f}  {cosines[1]:>14.2f}")


if __name__ == "__main__":
    main()
