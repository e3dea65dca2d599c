"""The layout of a residual adapter's weight file: plain `dict[str, Tensor]` in and out.

`adapter_model.safetensors` contains, besides the trained heads (`modules_to_save`):

| Key | Tensor |
|---|---|
| `prompt_embeddings` | the projected prompt `[P, H]`, float32: PEFT's own key, all that inference needs |
| `residual_prompt_tuning.format_version` | integer, no dimensions |
| `residual_prompt_tuning.embedding.weight` | the prompt embedding `[P, H]`; for SUPERPOS the weights `[P, M]` |
| `residual_prompt_tuning.network.*` | the weights of the network; for SUPERPOS the frozen `rows` `[M, H]` |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


FORMAT_VERSION = 1
PROJECTED_KEY = "prompt_embeddings"
PREFIX = "residual_prompt_tuning."
VERSION_KEY = PREFIX + "format_version"
EMBEDDING_KEY = "embedding.weight"
NETWORK_PREFIX = "network."


def pack(projected: Tensor, encoder_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lay out one adapter for its file.

    Args:
        projected (`torch.Tensor`): The projected prompt, `[P, H]`.
        encoder_state (`Mapping[str, torch.Tensor]`): `embedding.weight` and `network.*`.

    Returns:
        `dict[str, torch.Tensor]`: The tensors under the keys of the table above.
    """
    packed = {PROJECTED_KEY: projected, VERSION_KEY: torch.tensor(FORMAT_VERSION)}
    packed.update({PREFIX + leaf: tensor for leaf, tensor in encoder_state.items()})
    return packed


def unpack(tensors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Take one adapter's file apart.

    Returns:
        `tuple`: The projected prompt `[P, H]`, the encoder's state (`embedding.weight`, `network.*`), and the trained
        heads (all other tensors).

    Raises:
        ValueError: If the version is unknown, or a part is missing.
    """
    projected = projected_prompt(tensors)
    version = tensors.get(VERSION_KEY)
    if version is not None and (version.numel() != 1 or version.item() != FORMAT_VERSION):
        raise ValueError(
            f"The checkpoint has format version {version.tolist()}, this peft_residual reads {FORMAT_VERSION}. "
            "Upgrade peft_residual."
        )
    if version is None or PREFIX + EMBEDDING_KEY not in tensors:
        raise ValueError(
            "The checkpoint has a projected prompt without the prompt embedding and its network, though its config "
            "says RESIDUAL_PROMPT_TUNING. Training cannot continue from it. Use the folder that "
            "`model.save_pretrained` wrote, or initialize a new adapter with it: prompt_tuning_init='PROMPT'."
        )
    state = {key.removeprefix(PREFIX): tensors[key] for key in tensors if key.startswith(PREFIX)}
    del state[VERSION_KEY.removeprefix(PREFIX)]
    heads = {key: tensors[key] for key in tensors if key != PROJECTED_KEY and not key.startswith(PREFIX)}
    return projected, state, heads


def projected_prompt(tensors: Mapping[str, Tensor]) -> Tensor:
    """The projected prompt of one adapter's file.

    Raises:
        ValueError: If there is none.
    """
    if PROJECTED_KEY not in tensors:
        raise ValueError(
            f"The checkpoint has no `{PROJECTED_KEY}`, only {sorted(tensors)}. It is not a prompt, or an incomplete "
            "one: save the adapter again."
        )
    return tensors[PROJECTED_KEY]


def format_version(tensors: Mapping[str, Tensor]) -> int | None:
    """The format version of one adapter's file; None for a plain prompt."""
    version = tensors.get(VERSION_KEY)
    if version is None or version.numel() != 1 or version.is_floating_point():
        return None
    return int(version)


def strip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep what plain prompt tuning needs: the projected prompt and the trained heads."""
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(PREFIX)}


def check_leaves(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Compare an encoder's state with a checkpoint's, leaf by leaf.

    Raises:
        ValueError: If a leaf is missing, unknown, of another shape, or not floating-point; names every such leaf.
    """

    def shape(tensors: Mapping[str, Tensor], leaf: str) -> str:
        return str(list(tensors[leaf].shape)) if leaf in tensors else "nothing"

    mismatches = [
        f"  {leaf}: expected {shape(expected, leaf)}, found {shape(found, leaf)}"
        for leaf in sorted(expected.keys() | found.keys())
        if shape(expected, leaf) != shape(found, leaf)
    ]
    if mismatches:
        raise ValueError(
            "The checkpoint was made with another network, prompt length or model width than this adapter's config "
            "describes:\n" + "\n".join(mismatches) + "\nBuild the model with the checkpoint's own "
            "`adapter_config.json` (`PeftModel.from_pretrained`), or give this config the same `encoder_*` and "
            "`num_virtual_tokens` values."
        )
    wrong = [
        f"{leaf} of type {found[leaf].dtype}"
        for leaf, tensor in sorted(expected.items())
        if tensor.is_floating_point() != found[leaf].is_floating_point()
    ]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: expected floating-point numbers. Save or download the adapter again.")


def check_projection(settings: Mapping[str, Any], projected: Tensor, recomputed: Tensor) -> None:
    """Check that a checkpoint's prompt embedding and network, under its config, result in its projected prompt.

    Settings such as the activation leave no trace in the shapes of the weights. This check finds them.

    Args:
        settings (`Mapping[str, Any]`): The config's fields, for the message.
        projected (`torch.Tensor`): `[P, H]`, from the checkpoint.
        recomputed (`torch.Tensor`): `[P, H]`, float32, from the checkpoint's embedding and network.

    Raises:
        ValueError: If they differ by more than the rounding of other hardware explains.
    """
    if is_same_projection(projected.cpu().float(), recomputed):
        return
    settings = {name: value for name, value in settings.items() if name.startswith("encoder_")}
    raise ValueError(
        "The checkpoint's prompt embedding and network do not result in its own projected prompt under this config: "
        f"the checkpoint was trained with other settings, or is damaged. Settings here: {settings}. Compare them with "
        "the checkpoint's `adapter_config.json`, or save or download the adapter again."
    )


def is_same_projection(projected: Tensor, recomputed: Tensor) -> bool:
    """Whether two projected prompts differ by no more than the rounding of other hardware explains."""
    if torch.equal(projected, recomputed):
        return True
    if projected.shape != recomputed.shape:
        return False
    tolerance = 1e-3 * float(projected.abs().nan_to_num(posinf=0).max())
    return torch.allclose(recomputed, projected, rtol=1e-3, atol=tolerance, equal_nan=True)
