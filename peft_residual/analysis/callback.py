"""`PromptReportCallback`: what becomes of a prompt while it trains."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from ..storage.sharded import is_sharded
from ..word_embeddings import vocabulary_sample
from .nearest import check_k, nearest_rows, prompts_of
from .report import network_share


class PromptReportCallback(TrainerCallback):
    """Log how a prompt changes, as often as the Trainer logs the loss, wherever the Trainer logs.

    `prompt_norm` is the median norm of the projected tokens, divided by that of the vocabulary. `prompt_network_share`
    is the network's mean share of a token, as in [`PromptReport`]. `prompt_distance` is how far a projected token has
    moved since this training began, on average, in median norms of the vocabulary. The words that are nearest to the
    first tokens (cosine similarity) are written to the terminal and to `trainer.state.log_history`, as
    `prompt_nearest`: most loggers take numbers only. Nothing is logged if the weights are sharded.

    Args:
        trainer (`transformers.Trainer`): The trainer that logs. Add the callback to it.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The base model's, to name words. None leaves the words out.
        tokens (`int`): Virtual tokens whose words are shown.
        k (`int`): Words for each of them.

    Example:

    ```python
    trainer.add_callback(PromptReportCallback(trainer, tokenizer))
    ```
    """

    def __init__(self, trainer: Any, tokenizer: Any = None, tokens: int = 3, k: int = 3) -> None:
        check_k(k)
        self.trainer, self.tokenizer, self.tokens, self.k = trainer, tokenizer, tokens, k
        self._start: Tensor | None = None
        self._unit = 1.0

    def _model(self) -> Any:
        from accelerate.utils import extract_model_from_parallel

        return extract_model_from_parallel(self.trainer.model, keep_torch_compile=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the prompt, and log it."""
        model = self._model()
        if is_sharded(model.prompt_encoder) or is_sharded(model.word_embeddings):
            warnings.warn("The weights are sharded, so nothing about the prompt will be logged.", stacklevel=2)
            return
        self._unit = vocabulary_sample(model.word_embeddings).float().norm(dim=1).median().item()
        self._start = prompts_of(model, None)[2]
        self._log(state, self._start)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the prompt if the Trainer is about to log the loss."""
        if control.should_log and self._start is not None:
            self._log(state, self._start)
            control.should_log = True  # which `Trainer.log` has turned off

    @torch.no_grad()
    def _log(self, state: Any, start: Tensor) -> None:
        model = self._model()
        _, config, projected, embedding = prompts_of(model, None)
        logs = {
            "prompt_norm": (projected.norm(dim=1).median() / self._unit).item(),
            "prompt_distance": ((projected - start).norm(dim=1).mean() / self._unit).item(),
        }
        if embedding is not None:
            logs["prompt_network_share"] = network_share(config, embedding, projected).mean().item()
        self.trainer.log(logs)
        if self.tokenizer is None or not state.is_world_process_zero:
            return
        from tqdm.auto import tqdm

        first, table = {"projected": projected[: self.tokens]}, model.word_embeddings
        found = nearest_rows(first, table, self.tokenizer, self.k, ("cosine",))["projected"]["cosine"]
        words = [" ".join(of_token) for of_token in found.tokens]
        state.log_history[-1]["prompt_nearest"] = words
        tqdm.write("nearest to the first virtual tokens: " + " | ".join(words))
