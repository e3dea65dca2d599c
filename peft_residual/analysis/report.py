"""What a trained prompt is made of: its norms, its network's share, how far it has moved, which words it is near.

Letters used below: `P` virtual tokens, `H` width of the embeddings, `V` rows of the vocabulary that are compared with,
`k` neighbours.
"""

from __future__ import annotations

import copy
import html
import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig
from torch import Tensor, nn

from ..config import ResidualPromptTuningConfig
from ..encoder import ResidualPromptEncoder
from ..export.prompt_tuning import get_prompt_tensor
from ..initialization import look_up, num_rows
from ..storage.checkpoint import EMBEDDING_KEY
from ..storage.saved_adapter import read_adapter


METRICS = ("cosine", "euclidean")
_ROWS_AT_ONCE = 8192  # of the vocabulary: bounds the memory that comparing takes
_LEGEND = (
    "norm rank: share of the vocabulary that is shorter. network: the network's share of the token. from start: how",
    "far the raw token (the token, where no raw one is shown) is from where it started. closest other: largest cosine",
    "to another virtual token.",
)


@dataclass(frozen=True)
class NearestTokens:
    """The rows of the vocabulary that are nearest to each virtual token, the nearest first.

    Attributes:
        prompt (`str`): `"raw"` or `"projected"`.
        metric (`str`): `"cosine"` (similarity, the larger the nearer) or `"euclidean"` (distance).
        ids (`torch.Tensor`): `[P, k]`, token ids.
        values (`torch.Tensor`): `[P, k]`, similarities or distances, float32.
        rows (`torch.Tensor`): `[P, k, H]`, the embeddings themselves, float32.
        tokens (`list[list[str]]`): The ids in words; `"#7"` for id 7 without a tokenizer.
    """

    prompt: str
    metric: str
    ids: Tensor
    values: Tensor
    rows: Tensor
    tokens: list[list[str]]

    def to_dict(self) -> dict[str, Any]:
        """All but the rows, as JSON can hold it."""
        return {"ids": self.ids.tolist(), "values": self.values.tolist(), "tokens": self.tokens}


@dataclass(frozen=True)
class PromptReport:
    """What [`inspect_prompt`] found. Tensors are float32, on the CPU.

    Attributes:
        name (`str`): The adapter's name or folder.
        projected (`torch.Tensor`): `[P, H]`, what the frozen model sees.
        raw (`torch.Tensor`, *optional*): `[P, H]`; None for plain prompt tuning, and for SUPERPOS, whose raw prompt is
            no point among the embeddings.
        norms (`torch.Tensor`): `[P]`, Euclidean lengths of the projected tokens.
        raw_norms (`torch.Tensor`, *optional*): `[P]`.
        network_share (`torch.Tensor`, *optional*): `[P]`, how much of each projected token is the network's: with `n`
            what the network adds and `e` what the skip does (zero without a skip), `‖n‖ / (‖n‖ + ‖e‖)`. 0 is all raw
            prompt, 1 is all network.
        similarity (`torch.Tensor`): `[P, P]`, cosine similarities of the projected tokens.
        vocabulary_norms (`torch.Tensor`, *optional*): `[V]`, ascending; None without a base model.
        distance_from_start (`torch.Tensor`, *optional*): `[P]`, Euclidean, of the raw prompt (where that is None, of
            the projected one) from where it started. The start is not saved: it is made anew from the config, its
            seed and the base model.
        no_start (`str`, *optional*): Why `distance_from_start` is None.
        nearest (`dict`): `nearest["projected"]["cosine"]` and so on; empty without a base model.
    """

    name: str
    projected: Tensor
    raw: Tensor | None
    norms: Tensor
    raw_norms: Tensor | None
    network_share: Tensor | None
    similarity: Tensor
    vocabulary_norms: Tensor | None
    distance_from_start: Tensor | None
    no_start: str | None
    nearest: dict[str, dict[str, NearestTokens]]

    @property
    def norm_ranks(self) -> Tensor | None:
        """`[P]`: the share of the vocabulary whose rows are shorter than the projected token; None without one."""
        if self.vocabulary_norms is None:
            return None
        return torch.searchsorted(self.vocabulary_norms, self.norms) / len(self.vocabulary_norms)

    @property
    def vocabulary_norm_quantiles(self) -> dict[str, float] | None:
        """Norms of the vocabulary's shortest row, of its median, its longest, and between; None without one."""
        if self.vocabulary_norms is None:
            return None
        at = [0.0, 0.05, 0.5, 0.95, 1.0]
        index = (torch.tensor(at) * (len(self.vocabulary_norms) - 1)).round().long()
        return dict(zip(map(str, at), self.vocabulary_norms[index].tolist()))

    def to_dict(self) -> dict[str, Any]:
        """All but the prompts themselves, as JSON can hold it; of the vocabulary's norms, five quantiles."""
        return {
            "name": self.name,
            "num_virtual_tokens": len(self.projected),
            "token_dim": self.projected.shape[1],
            "norms": self.norms.tolist(),
            "raw_norms": _to_list(self.raw_norms),
            "norm_ranks": _to_list(self.norm_ranks),
            "vocabulary_norm_quantiles": self.vocabulary_norm_quantiles,
            "network_share": _to_list(self.network_share),
            "distance_from_start": _to_list(self.distance_from_start),
            "no_start": self.no_start,
            "similarity": self.similarity.tolist(),
            "nearest": {
                prompt: {metric: found.to_dict() for metric, found in of_prompt.items()}
                for prompt, of_prompt in self.nearest.items()
            },
        }

    def to_json(self) -> str:
        """`to_dict` as a JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and one row of texts per virtual token; a column only for what is known."""
        off_diagonal = self.similarity - 2 * torch.eye(len(self.similarity))
        numbers: list[tuple[str, Tensor | None, str]] = [
            ("norm", self.norms, "{:.2f}"),
            ("norm rank", self.norm_ranks, "{:.0%}"),
            ("raw norm", self.raw_norms, "{:.2f}"),
            ("network", self.network_share, "{:.0%}"),
            ("from start", self.distance_from_start, "{:.2f}"),
            ("closest other", off_diagonal.max(dim=1).values if len(self.similarity) > 1 else None, "{:.2f}"),
        ]
        columns = [["token", *map(str, range(len(self.norms)))]]
        for heading, values, pattern in numbers:
            if values is not None:
                columns.append([heading, *map(pattern.format, values.tolist())])
        for prompt, of_prompt in self.nearest.items():
            found = of_prompt["cosine"]
            texts = [
                "  ".join(f"{token} {value:.2f}" for token, value in zip(tokens, values))
                for tokens, values in zip(found.tokens, found.values.tolist())
            ]
            columns.append([f"nearest to {prompt} (cosine)", *texts])
        rows = [list(row) for row in zip(*columns)]
        return rows[0], rows[1:]

    def _caption(self) -> list[str]:
        lines = [f"{self.name}: {len(self.projected)} virtual tokens of width {self.projected.shape[1]}"]
        quantiles = self.vocabulary_norm_quantiles
        if self.vocabulary_norms is not None and quantiles is not None:
            rows = len(self.vocabulary_norms)
            lines.append(f"Rows of the vocabulary: {rows:,}, median norm {quantiles['0.5']:.2f}.")
        if self.no_start:
            lines.append(f"Distance from the start is not known: {self.no_start}")
        return [*lines, *_LEGEND]

    def __str__(self) -> str:
        """A table for a terminal."""
        heading, rows = self._table()
        widths = [max(map(len, column)) for column in zip(heading, *rows)]
        words = [text.startswith("nearest") for text in heading]
        lines = [
            "  ".join(
                text.ljust(width) if is_words else text.rjust(width)
                for text, width, is_words in zip(row, widths, words)
            ).rstrip()
            for row in [heading, *rows]
        ]
        return "\n".join([*self._caption(), "", *lines])

    def _repr_html_(self) -> str:
        """A table for a notebook."""
        heading, rows = self._table()
        head = "".join(f"<th>{html.escape(text)}</th>" for text in heading)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
        caption = "<br>".join(map(html.escape, self._caption()))
        return f"<p>{caption}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def inspect_prompt(
    model_or_adapter_folder: PeftModel | str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    k: int = 5,
    adapter_name: str = "default",
) -> PromptReport:
    """Look inside a prompt, residual or plain.

    Args:
        model_or_adapter_folder ([`~peft.PeftModel`], `str` or `os.PathLike`): A model, or the folder (or Hub id) of a
            saved adapter. A folder needs no base model, and then has no vocabulary to compare with and no start.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The base model's: token ids in words, and no neighbours
            among the rows past its end.
        k (`int`): Neighbours per virtual token.
        adapter_name (`str`): Which adapter of a model.

    Returns:
        [`PromptReport`]: `print` it, show it in a notebook, or take `to_dict()`, `to_json()` and its tensors.

    Raises:
        ValueError: If there is no such adapter, it is damaged, or `k` is below 1.
    """
    _check_k(k)
    vocabulary_norms, start, nearest = None, None, {}
    if isinstance(model_or_adapter_folder, PeftModel):
        model = model_or_adapter_folder
        name, config, projected, raw = _of_model(model, adapter_name)
        nearest = nearest_tokens(model, tokenizer, k, adapter_name=adapter_name)
        rows = _vocabulary(model.word_embeddings, tokenizer)
        vocabulary_norms = torch.cat([look_up(model.word_embeddings, part).norm(dim=1) for part in _parts(rows)])
        start, no_start = _start(config, model.word_embeddings)
    else:
        name = str(model_or_adapter_folder)
        saved = read_adapter(model_or_adapter_folder)
        config, projected = saved.config, saved.projected.float()
        raw = saved.state[EMBEDDING_KEY].float() if _has_raw(config) else None
        no_start = "that takes the base model."
    unit = nn.functional.normalize(projected, dim=1)
    return PromptReport(
        name=name,
        projected=projected,
        raw=raw,
        norms=projected.norm(dim=1),
        raw_norms=None if raw is None else raw.norm(dim=1),
        network_share=None if raw is None else _network_share(config, raw, projected),
        similarity=unit @ unit.T,
        vocabulary_norms=None if vocabulary_norms is None else vocabulary_norms.sort().values,
        distance_from_start=None if start is None else ((projected if raw is None else raw) - start).norm(dim=1),
        no_start=no_start,
        nearest=nearest,
    )


def nearest_tokens(
    model: PeftModel, tokenizer: Any = None, k: int = 5, *, adapter_name: str = "default"
) -> dict[str, dict[str, NearestTokens]]:
    """Find the rows of the vocabulary that are nearest to each virtual token (Lester et al., 2021, section 7).

    Rows are what the model's embedding module returns, scaled where it scales.

    Args:
        model ([`~peft.PeftModel`]): With a residual or a plain prompt tuning adapter.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The base model's: token ids in words, and no neighbours
            among the rows past its end.
        k (`int`): Neighbours per virtual token.
        adapter_name (`str`): Which adapter.

    Returns:
        `dict`: `["projected"]["cosine"]`, `["projected"]["euclidean"]` and, where [`PromptReport`] has a raw prompt,
        the same under `["raw"]`: a [`NearestTokens`] each.

    Raises:
        ValueError: If there is no such adapter, or `k` is below 1.
    """
    _check_k(k)
    _, _, projected, raw = _of_model(model, adapter_name)
    prompts = {"projected": projected} if raw is None else {"projected": projected, "raw": raw}
    table = model.word_embeddings
    vocabulary = _vocabulary(table, tokenizer)
    nearness: dict[tuple[str, str], list[Tensor]] = {(p, metric): [] for p in prompts for metric in METRICS}
    for part in _parts(vocabulary):
        rows = look_up(table, part)
        unit = nn.functional.normalize(rows, dim=1)
        for name, prompt in prompts.items():
            nearness[name, "cosine"].append(nn.functional.normalize(prompt, dim=1) @ unit.T)
            # Not by way of a product of matrices, which is wrong where a token is a row or near one.
            distances = torch.cdist(prompt, rows, compute_mode="donot_use_mm_for_euclid_dist")
            nearness[name, "euclidean"].append(-distances)
    found: dict[str, dict[str, NearestTokens]] = {name: {} for name in prompts}
    for (name, metric), parts in nearness.items():
        values, ids = torch.cat(parts, dim=1).topk(min(k, len(vocabulary)))
        rows = look_up(table, ids.flatten().tolist()).unflatten(0, ids.shape)
        tokens = [_in_words(tokenizer, of_token) for of_token in ids.tolist()]
        found[name][metric] = NearestTokens(name, metric, ids, values if metric == "cosine" else -values, rows, tokens)
    return found


def _check_k(k: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"`k` must be an integer of at least 1, got {k!r}.")


def _of_model(model: PeftModel, adapter_name: str) -> tuple[str, PromptTuningConfig, Tensor, Tensor | None]:
    projected = get_prompt_tensor(model, adapter_name).detach().float().cpu()
    config = model.peft_config[adapter_name]
    encoder = model.prompt_encoder[adapter_name]
    raw = encoder.embedding.weight.detach().float().cpu() if _has_raw(config) else None
    return adapter_name, config, projected, raw


def _has_raw(config: PromptTuningConfig) -> bool:
    return isinstance(config, ResidualPromptTuningConfig) and not config.mixes_vocabulary


def _network_share(config: PromptTuningConfig, raw: Tensor, projected: Tensor) -> Tensor:
    # Without a network the raw prompt passes through as it is, which is a skip by another name.
    skipped = raw if config.has_skip or torch.equal(raw, projected) else torch.zeros_like(projected)
    added, kept = (projected - skipped).norm(dim=1), skipped.norm(dim=1)
    return added / (added + kept).clamp_min(torch.finfo(added.dtype).tiny)


def _start(config: PromptTuningConfig, word_embeddings: nn.Module) -> tuple[Tensor | None, str | None]:
    """The prompt that training started from, raw if there is a raw one, made anew; or None and why it cannot be."""
    if not isinstance(config, ResidualPromptTuningConfig):
        return None, "a plain prompt's start leaves no trace."
    if config.prompt_tuning_init_seed is None and config.prompt_tuning_init not in ("TEXT", "PROMPT"):
        return None, "the config has no `prompt_tuning_init_seed`."
    config = copy.deepcopy(config)
    config.inference_mode = False  # or the encoder would wait for weights instead of making a start
    try:
        encoder = ResidualPromptEncoder(config, word_embeddings)
    except (ValueError, OSError) as error:  # its tokenizer or its source is gone
        return None, str(error)
    return (encoder.embedding.weight if _has_raw(config) else encoder.eval().project()).detach(), None


def _vocabulary(word_embeddings: nn.Module, tokenizer: Any) -> range:
    rows = num_rows(word_embeddings)
    return range(rows if tokenizer is None else min(rows, len(tokenizer)))


def _parts(vocabulary: range) -> list[range]:
    return [vocabulary[start : start + _ROWS_AT_ONCE] for start in range(0, len(vocabulary), _ROWS_AT_ONCE)]


def _in_words(tokenizer: Any, ids: list[int]) -> list[str]:
    if tokenizer is None:
        return [f"#{i}" for i in ids]
    return [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]


def _to_list(values: Tensor | None) -> list[float] | None:
    return None if values is None else values.tolist()
