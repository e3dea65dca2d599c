"""The oracle for models: a prompt made of real words' embeddings gives what the base model gives for those words.

[`verdicts`] checks every use of a model with a prompt against the base model alone, row by row, with the words in
front of the text.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor

from peft_residual import ResidualPromptTuningConfig


WORDS = (11, 12, 13, 14)
TEXTS = ((21, 32, 43, 21, 32, 43, 21, 32), (51, 62, 73, 51, 62))
LABELS = ((24, 35, 46), (57, 68, 79))  # of encoder-decoder models
NEW_TOKENS = 5

RIGHT, REFUSED, NOT_APPLICABLE, FAILS, WRONG = "right", "refused", "n/a", "fails", "wrong"


class NotApplicable(Exception):
    """The base model itself cannot do this, or is not exact in it."""


def verdicts(base: Any, task_type: str, stock: bool = False) -> dict[str, tuple[str, str]]:
    """Check every use of a model.

    Args:
        base (`transformers.PreTrainedModel`): In eval mode; copied.
        task_type (`str`): PEFT's task type.
        stock (`bool`): Whether to check PEFT's prompt tuning instead of this package.

    Returns:
        `dict`: By name of the check: the verdict, and the message of an error.
    """
    base = copy.deepcopy(base)
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.eos_token_id, base.generation_config.pad_token_id = None, 0
    found: dict[str, tuple[str, str]] = {}
    oracles: list[Oracle] = []
    found["build"] = _verdict(lambda: oracles.append(Oracle(base, task_type, stock)) or True)
    names = CHECKS[task_type] if oracles else ()
    return {**found, **{name: _verdict(getattr(oracles[0], name)) for name in names}}


def _verdict(check: Callable[[], bool]) -> tuple[str, str]:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return (RIGHT if check() else WRONG), ""
    except NotApplicable as reason:
        return NOT_APPLICABLE, str(reason)
    except Exception as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        is_ours = "peft_residual" in raised_in and isinstance(error, (ValueError, AttributeError))
        return (REFUSED if is_ours else FAILS), f"{type(error).__name__}: {error}"


def _differ(got: Tensor, want: Tensor) -> bool:
    return not torch.allclose(got.float(), want.float(), rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def _read(outputs: Any, row: int, columns: Tensor) -> Tensor:
    """What an output says of one row; `columns` of the text count from the end."""
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits[row, columns], outputs.end_logits[row, columns]])
    states = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    return states[row, columns] if states.ndim == 3 and "encoder_last_hidden_state" not in outputs else states[row]


class Oracle:
    """The checks of one model: each returns whether the prompted model is right.

    Args:
        base (`transformers.PreTrainedModel`): In eval mode.
        task_type (`str`): PEFT's task type.
        stock (`bool`): Whether the prompt is PEFT's own.
    """

    def __init__(self, base: Any, task_type: str, stock: bool) -> None:
        self.base, self.task_type = base, task_type
        self.untouched = copy.deepcopy(base)  # recurrent models keep states
        fields = {"task_type": task_type, "num_virtual_tokens": len(WORDS)}
        if stock:
            config: Any = PromptTuningConfig(num_transformer_submodules=1, **fields)
        else:
            config = ResidualPromptTuningConfig(encoder_reparameterization_type="NONE", **fields)
        self.model = get_peft_model(copy.deepcopy(base), config).eval()
        if getattr(base, "generation_config", None) is not None:
            self.model.generation_config = copy.deepcopy(base.generation_config)
        with torch.no_grad():
            words = self.base.get_input_embeddings()(torch.tensor(WORDS))
            self.model.prompt_encoder["default"].embedding.weight.copy_(words)

    def _labels(self, rows: Any) -> dict[str, Tensor]:
        name = {"SEQ_2_SEQ_LM": "labels", "FEATURE_EXTRACTION": "decoder_input_ids"}.get(self.task_type)
        has_decoder = self.base.config.is_encoder_decoder and name is not None
        return {name: torch.tensor([LABELS[row] for row in rows])} if has_decoder else {}

    def _alone(self, row: int) -> Tensor:
        """The base model's output for one text after the words."""
        ids = torch.tensor([WORDS + TEXTS[row]])
        outputs = self.base(input_ids=ids, attention_mask=torch.ones_like(ids), **self._labels([row]))
        return _read(outputs, 0, torch.arange(-len(TEXTS[row]), 0))

    def _batch(self, side: str, front: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Both texts as one batch, and its mask."""
        rows = [front + text for text in TEXTS]
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for row, text in zip(ids, rows, strict=True):
            row[longest - len(text) if side == "left" else 0 :][: len(text)] = torch.tensor(text)
        return ids, (ids != 0).long()

    def _rows_right(self, model: Any, ids: Tensor, mask: Tensor, **extra: Any) -> bool:
        outputs = model(input_ids=ids, attention_mask=mask, **extra, **self._labels(range(len(TEXTS))))
        for row, text in enumerate(TEXTS):
            columns = mask[row].nonzero().flatten()[-len(text) :] - mask.shape[1]
            if _differ(_read(outputs, row, columns), self._alone(row)):
                return False
        return True

    def _padding(self, side: str) -> bool:
        ids, mask = self._batch(side, WORDS)
        extra = {}
        if side == "left" and "position_ids" in inspect.signature(type(self.base).forward).parameters:
            if getattr(self.model, "is_decoder_only", lambda: True)():
                extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if not self._rows_right(self.base, ids, mask, **extra):
            raise NotApplicable(f"the base model itself is not exact with {side} padding")
        return self._rows_right(self.model, *self._batch(side))

    def _one(self, model: Any = None, **inputs: Any) -> Any:
        """The prompted model's outputs for the first text."""
        ids = torch.tensor([TEXTS[0]])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self._labels([0]), **inputs}
        given = {name: value for name, value in given.items() if value is not None}
        return (model or self.model)(**given)

    def forward(self) -> bool:
        """Does a plain batch give the base model's outputs?"""
        columns = torch.arange(-len(TEXTS[0]), 0)
        return not _differ(_read(self._one(), 0, columns), self._alone(0))

    def left_padding(self) -> bool:
        """Does each row of a left-padded batch give what it gives alone?"""
        return self._padding("left")

    def right_padding(self) -> bool:
        """Does each row of a right-padded batch give what it gives alone?"""
        return self._padding("right")

    def embeds(self) -> bool:
        """The same, given as `inputs_embeds`."""
        embeds = self.base.get_input_embeddings()(torch.tensor([TEXTS[0]]))
        columns = torch.arange(-len(TEXTS[0]), 0)
        return not _differ(_read(self._one(input_ids=None, inputs_embeds=embeds), 0, columns), self._alone(0))

    def training(self) -> bool:
        """Are the loss and the gradient of every row of the prompt what they are for the words?"""
        words, text = torch.tensor([WORDS]), torch.tensor([TEXTS[0]])
        given, wanted = {}, {}
        if self.task_type == "CAUSAL_LM":
            given["labels"], wanted["labels"] = text, torch.cat([torch.full_like(words, -100), text], 1)
        embeds = self.base.get_input_embeddings()(torch.cat([words, text], 1)).requires_grad_()
        weight = self.model.prompt_encoder["default"].embedding.weight
        with torch.enable_grad():
            try:
                mask = torch.ones(embeds.shape[:2], dtype=torch.long)
                want = self._loss(self.base(inputs_embeds=embeds, attention_mask=mask, **wanted, **self._labels([0])))
                want.backward()
            except Exception as error:
                raise NotApplicable(f"the base model fails: {error}") from error
            loss = self._loss(self._one(**given))
            loss.backward()
        gradient, weight.grad = weight.grad, None
        return not _differ(loss, want) and not _differ(gradient, embeds.grad[0, : len(WORDS)])

    def shared_prompt(self) -> bool:
        """Training and a padded batch with the prompt computed once for all rows."""
        if not hasattr(self.model, "share_prompt"):
            raise NotApplicable("PEFT has none")
        self.model.share_prompt(True)
        try:
            return self.training() and self._padding("right")
        finally:
            self.model.share_prompt(None)

    def _loss(self, outputs: Any) -> Tensor:
        if outputs.get("loss") is not None:
            return outputs["loss"]
        return _read(outputs, 0, torch.arange(-len(TEXTS[0]), 0)).square().sum()

    def saved(self) -> bool:
        """Does a saved and loaded adapter give the same outputs?"""
        columns = torch.arange(-len(TEXTS[0]), 0)
        want = _read(self._one(), 0, columns)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(self.untouched, folder).eval()
        return not _differ(_read(self._one(loaded), 0, columns), want)

    def _tokens(self, model: Any, ids: Tensor, mask: Tensor, **settings: Any) -> list[list[int]]:
        torch.manual_seed(0)
        fixed = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **settings}
        out = model.generate(input_ids=ids, attention_mask=mask, **fixed)
        return out[:, 0 if self.base.config.is_encoder_decoder else ids.shape[1] :].tolist()

    def _base_tokens(self, row: int, **settings: Any) -> list[list[int]]:
        ids = torch.tensor([WORDS + TEXTS[row]])
        return self._tokens_of_base(ids, torch.ones_like(ids), **settings)

    def _tokens_of_base(self, ids: Tensor, mask: Tensor, **settings: Any) -> list[list[int]]:
        try:
            return self._tokens(self.base, ids, mask, **settings)
        except Exception as error:
            raise NotApplicable(f"the base model fails: {error}") from error

    def _generates(self, as_greedy: bool = False, **settings: Any) -> bool:
        want = self._base_tokens(0, **settings)
        if as_greedy and want != self._base_tokens(0):  # candidates and static caches change no token
            raise NotApplicable("the base model itself generates other tokens than without it")
        ids = torch.tensor([TEXTS[0]])
        return self._tokens(self.model, ids, torch.ones_like(ids), **settings) == want

    def greedy(self) -> bool:
        """Greedy decoding."""
        return self._generates()

    def greedy_padded(self) -> bool:
        """Greedy decoding of a padded batch: on the left, for encoder-decoder models on the right."""
        side = "right" if self.base.config.is_encoder_decoder else "left"
        want = [tokens for row in range(len(TEXTS)) for tokens in self._base_tokens(row)]
        if self._tokens_of_base(*self._batch(side, WORDS)) != want:
            raise NotApplicable("the base model itself generates other tokens with padding")
        return self._tokens(self.model, *self._batch(side)) == want

    def sampled(self) -> bool:
        """Sampling with a seed."""
        return self._generates(do_sample=True, top_k=20)

    def beams(self) -> bool:
        """Beam search."""
        return self._generates(num_beams=3)

    def static_cache(self) -> bool:
        """A cache of a fixed size."""
        return self._generates(as_greedy=True, cache_implementation="static")

    def _check_direction(self) -> None:
        last = torch.tensor([WORDS + TEXTS[0][:-1] + TEXTS[1][-1:]])
        columns = torch.arange(-len(TEXTS[0]), -1)
        if _differ(_read(self.base(last, attention_mask=torch.ones_like(last)), 0, columns), self._alone(0)[:-1]):
            raise NotApplicable("the base model reads in both directions: candidates change the tokens before them")

    def prompt_lookup(self) -> bool:
        """Candidates from the text itself."""
        self._check_direction()
        return self._generates(as_greedy=True, prompt_lookup_num_tokens=2)

    def assisted(self) -> bool:
        """Candidates from another model, here the base model."""
        self._check_direction()
        return self._generates(as_greedy=True, assistant_model=copy.deepcopy(self.base))

    def prompt_cache(self) -> bool:
        """The prompt's keys and values, kept between batches."""
        if not hasattr(self.model, "enable_prompt_cache"):
            raise NotApplicable("PEFT has none")
        self.model.enable_prompt_cache()
        try:
            right = self.greedy()
            if "logits_to_keep" in inspect.signature(type(self.base).forward).parameters:
                right = right and not _differ(self._one(logits_to_keep=1).logits[0, -1], self._alone(0)[-1])
            return right
        finally:
            self.model.disable_prompt_cache()


_FORWARD = ("forward", "right_padding", "embeds", "training", "saved")
_GENERATE = ("greedy", "greedy_padded", "sampled", "beams", "static_cache")
CHECKS = {
    "CAUSAL_LM": (*_FORWARD, "left_padding", *_GENERATE, "shared_prompt", "prompt_cache", "prompt_lookup", "assisted"),
    "SEQ_2_SEQ_LM": (*_FORWARD, "left_padding", *_GENERATE),
    "SEQ_CLS": (*_FORWARD, "left_padding"),
    "TOKEN_CLS": (*_FORWARD, "left_padding"),
    "QUESTION_ANS": (*_FORWARD, "left_padding"),
    "FEATURE_EXTRACTION": (*_FORWARD, "left_padding"),
}
