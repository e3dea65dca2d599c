"""Ways to damage a saved adapter: each takes a whole folder and a seeded generator, and leaves one that is not whole.

What happens to leave a whole adapter (a bit flipped in the last digit of a weight, say) is not damage and not made here.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

Damage = Callable[[Path, random.Random], None]
WAYS: list[Damage] = []


def way(function: Damage) -> Damage:
    """Add a way to damage an adapter."""
    WAYS.append(function)
    return function


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's config as it is."""
    return json.loads((folder / CONFIG).read_text())


def write_config(folder: Path, **changes: Any) -> None:
    """Change some fields of the adapter's config."""
    (folder / CONFIG).write_text(json.dumps({**read_config(folder), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the adapter's tensors, in a well-formed file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def header_length(data: bytes) -> int:
    """How long the JSON header of a safetensors file is."""
    return struct.unpack("<Q", data[:8])[0]


# --- files ----------------------------------------------------------------------------------------------------------


@way
def truncated_weights(folder, rng):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: rng.randrange(len(data))])


@way
def truncated_config(folder, rng):
    data = (folder / CONFIG).read_bytes().rstrip()
    (folder / CONFIG).write_bytes(data[: rng.randrange(len(data))])


@way
def missing_file(folder, rng):
    (folder / rng.choice((CONFIG, WEIGHTS))).unlink()


@way
def file_is_a_folder(folder, rng):
    path = folder / rng.choice((CONFIG, WEIGHTS))
    path.unlink()
    path.mkdir()


@way
def link_to_nowhere_to_itself_or_to_a_device(folder, rng):
    path = folder / rng.choice((CONFIG, WEIGHTS))
    path.unlink()
    path.symlink_to(rng.choice(("../../nowhere", path.name, "/dev/zero")))


@way
def link_to_another_file(folder, rng):
    """What `../../../etc/passwd` would be: a file outside of the folder, of another kind."""
    secret = folder.parent / "secret.txt"
    secret.write_text("root:x:0:0:root:/root:/bin/bash\n" * 9)
    path = folder / rng.choice((CONFIG, WEIGHTS))
    path.unlink()
    path.symlink_to("../secret.txt")


@way
def other_bytes(folder, rng):
    path = folder / rng.choice((CONFIG, WEIGHTS))
    path.write_bytes(rng.choice((b"\0" * 4096, rng.randbytes(4096), b"<!DOCTYPE html>", b"version https://git-lfs")))


# --- the header of the weight file ----------------------------------------------------------------------------------


@way
def flipped_header_bit(folder, rng):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[rng.randrange(8 + header_length(data))] ^= 1 << rng.randrange(8)
    (folder / WEIGHTS).write_bytes(data)


@way
def absurd_header_length(folder, rng):
    data = (folder / WEIGHTS).read_bytes()
    length = rng.choice((0, 1, header_length(data) - 1, len(data), 2**31, 2**63, 2**64 - 1))
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])


@way
def header_that_points_elsewhere(folder, rng):
    data = (folder / WEIGHTS).read_bytes()
    end = 8 + header_length(data)
    header = json.loads(data[8:end])
    key = rng.choice([key for key in header if key != "__metadata__"])
    header[key]["data_offsets"] = rng.choice(([0, 0], [0, 2**62], [4, 4], [len(data), 2 * len(data)], [-8, 0], "all"))
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


# --- tensors --------------------------------------------------------------------------------------------------------


@way
def other_shape(folder, rng):
    def change(tensors):
        key = rng.choice(sorted(tensors))
        tensor = tensors[key]
        shapes = [tensor.new_ones(3), tensor.new_ones(0), tensor.new_ones(7, 7), tensor.new_ones(2, 2, 2)]
        tensors[key] = rng.choice([new for new in shapes if new.shape != tensor.shape])

    change_tensors(folder, change)


@way
def transposed_prompt(folder, rng):
    change_tensors(folder, lambda tensors: tensors.update(prompt_embeddings=tensors["prompt_embeddings"].T))


@way
def not_a_number(folder, rng):
    def change(tensors):
        key = rng.choice([key for key, tensor in sorted(tensors.items()) if tensor.is_floating_point()])
        tensors[key].view(-1)[rng.randrange(tensors[key].numel())] = rng.choice([float("nan"), float("inf")])

    change_tensors(folder, change)


@way
def integers(folder, rng):
    def change(tensors):
        keys = [key for key in sorted(tensors) if tensors[key].is_floating_point() and "classifier" not in key]
        key = rng.choice(keys)
        tensors[key] = tensors[key].round().to(rng.choice((torch.int64, torch.uint8, torch.bool)))

    change_tensors(folder, change)


@way
def missing_tensor(folder, rng):
    def change(tensors):
        prompt = [key for key in sorted(tensors) if "classifier" not in key]
        for key in rng.choice([[rng.choice(prompt)], [key for key in tensors if "classifier" in key] or prompt]):
            del tensors[key]

    change_tensors(folder, change)


@way
def renamed_tensor(folder, rng):
    def change(tensors):
        keys = [key for key in sorted(tensors) if not key.endswith("classifier.bias")]
        key = rng.choice(keys)
        tensors[rng.choice(("../../" + key, "/etc/" + key, key + "/..", key.replace("e", "\\"), ""))] = tensors.pop(key)

    change_tensors(folder, change)


@way
def extra_tensor(folder, rng):
    names = ("../../x", "/etc/passwd", "..\\x", "x", "base_model.x", "base_model.nowhere.classifierx.weight")
    change_tensors(folder, lambda tensors: tensors.update({rng.choice(names): torch.ones(3)}))


@way
def another_adapters_prompt(folder, rng):
    """Well formed, and not what this adapter's own network makes, or of another length."""

    def change(tensors):
        if any(key.startswith("residual") for key in tensors):
            tensors["prompt_embeddings"] = tensors["prompt_embeddings"] + 1
        else:
            tensors["prompt_embeddings"] = torch.cat([tensors["prompt_embeddings"]] * 2)

    change_tensors(folder, change)


@way
def version_of_the_future(folder, rng):
    version = torch.tensor(rng.choice((0, 2, 99, 2**40)))
    change_tensors(folder, lambda tensors: tensors.update({"residual_prompt_tuning.format_version": version}))


# --- the config -----------------------------------------------------------------------------------------------------

# Values of every JSON type; a field is given those that are not of its own type.
JSON_VALUES = [None, True, -3, 2.5, "zz", [], [1], [None], {"a": 1}]
# Fields of which any text is a right value, or any number, or None.
RIGHT = {
    "base_model_name_or_path": (str, type(None)),
    "revision": (str, type(None)),
    "peft_version": (str, type(None)),
    "tokenizer_name_or_path": (str, type(None)),
    "inference_mode": (bool,),
    "num_layers": (int, type(None)),
    "num_attention_heads": (int, type(None)),
    "num_transformer_submodules": (type(None),),
    "token_dim": (type(None),),
    "prompt_tuning_init_text": (type(None),),
    "prompt_tuning_init_class_labels": (type(None), list),
    "prompt_tuning_init_token_ids": (type(None),),
    "prompt_tuning_init_state_dict_path": (type(None),),
    "prompt_tuning_init_seed": (type(None),),
    "tokenizer_kwargs": (type(None),),
    "auto_mapping": (type(None),),
    "encoder_shared": (bool,),
    "encoder_residual": (bool,),
    "encoder_layer_norm": (bool,),
    "modules_to_save": (type(None),),
}
