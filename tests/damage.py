"""Ways to damage a saved adapter: each takes a valid folder and a seeded generator, and leaves one that is not valid.

What leaves a valid adapter (a bit flipped in the last digit of a weight, for example) is not damage and is not here.
Neither is a head of another shape, which only the base model can show.
"""

from __future__ import annotations

import json
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
ONLY_RESIDUAL: set[Damage] = set()


def way(function: Damage) -> Damage:
    """Add a way to damage an adapter, residual or merged."""
    WAYS.append(function)
    return function


def way_for_residual(function: Damage) -> Damage:
    """Add a way that leaves a merged adapter as good as it was."""
    ONLY_RESIDUAL.add(function)
    return way(function)


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
        key = rng.choice([key for key in sorted(tensors) if "classifier" not in key])
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
        tensors[rng.choice(("../../" + key, "/etc/" + key, key + "/..", key.replace("e", "\\"), ""))] = tensors.pop(
            key
        )

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

# What JSON may hold for each field, stated again and apart from the package.
TEXT, INTEGER, NOTHING = (str,), (int,), (type(None),)
JSON_TYPES = {
    "auto_mapping": NOTHING,
    "base_model_name_or_path": TEXT + NOTHING,
    "encoder_activation": TEXT,
    "encoder_dropout": (float, int),
    "encoder_hidden_size": INTEGER,
    "encoder_layer_norm": (bool,),
    "encoder_norm_first": (bool,),
    "encoder_num_attention_heads": INTEGER,
    "encoder_reparameterization_type": TEXT,
    "encoder_residual": (bool,),
    "encoder_scale": (float, int),
    "encoder_shared": (bool,),
    "encoder_zero_init": (bool,),
    "inference_mode": (bool,),
    "prompt_tuning_init_vocab_size": INTEGER,
    "modules_to_save": (list, type(None)),
    "num_attention_heads": INTEGER + NOTHING,
    "num_layers": INTEGER + NOTHING,
    "num_transformer_submodules": INTEGER + NOTHING,
    "num_virtual_tokens": INTEGER,
    "peft_type": TEXT,
    "peft_version": TEXT + NOTHING,
    "prompt_tuning_init": TEXT,
    "prompt_tuning_init_class_labels": (list, type(None)),
    "prompt_tuning_init_seed": INTEGER + NOTHING,
    "prompt_tuning_init_state_dict_path": TEXT + NOTHING,
    "prompt_tuning_init_text": TEXT + NOTHING,
    "prompt_tuning_init_token_ids": (list, type(None)),
    "revision": TEXT + NOTHING,
    "task_type": TEXT,
    "token_dim": INTEGER + NOTHING,
    "tokenizer_kwargs": (dict, type(None)),
    "tokenizer_name_or_path": TEXT + NOTHING,
}


@way
def wrong_json_type(folder, rng):
    field = rng.choice(sorted(read_config(folder)))
    wrong = [value for value in (None, True, 3, 2.5, "zz", [1], {"a": 1}) if type(value) not in JSON_TYPES[field]]
    if field == "task_type" and "encoder_shared" not in read_config(folder):
        wrong.remove(None)  # which PEFT's own prompt tuning allows
    write_config(folder, **{field: rng.choice(wrong)})


@way
def wrong_items(folder, rng):
    write_config(folder, modules_to_save=rng.choice(([1], [None], ["classifier", ["x"]], ["classifier", 2.5])))


@way
def unknown_name(folder, rng):
    fields = ["peft_type", "task_type", "prompt_tuning_init"]
    if "encoder_shared" in read_config(folder):
        fields += ["encoder_reparameterization_type", "encoder_activation"]
    write_config(folder, **{rng.choice(fields): rng.choice(("MAGIC", "", "../../x", "os.system", "mlp1", "\ud800"))})


@way
def size_that_the_weights_do_not_have(folder, rng):
    """From off by one to more than any memory."""
    fields = ["num_virtual_tokens", "token_dim"]
    if "encoder_shared" in read_config(folder):
        fields.append("encoder_hidden_size")
    field = rng.choice(fields)
    right = read_config(folder)[field]
    write_config(folder, **{field: rng.choice((right + 1, right - 1, 0, -right, 10**9, 2**31, 2**40, 10**30))})


@way_for_residual
def setting_that_the_weights_contradict(folder, rng):
    changes = [
        {"encoder_residual": False},
        {"encoder_layer_norm": False},
        {"encoder_norm_first": True},
        {"encoder_shared": False},
        {"encoder_activation": "tanh"},
        {"encoder_reparameterization_type": "MLP2"},
        {"encoder_reparameterization_type": "TRANSFORMER"},
        {"num_transformer_submodules": 2},
    ]
    write_config(folder, **rng.choice(changes))


@way_for_residual
def value_out_of_range(folder, rng):
    changes = [
        {"encoder_dropout": rng.choice((-0.1, 1.0, float("nan"), float("inf")))},
        {"encoder_num_attention_heads": 0},
        {"num_transformer_submodules": 3},
        {"prompt_tuning_init_vocab_size": -1},
        {"prompt_tuning_init_seed": 2**64},
        {"prompt_tuning_init_token_ids": [1, -2]},
        {"prompt_tuning_init_class_labels": ["good", ""]},
        {"prompt_tuning_init": "PROMPT"},
        {"prompt_tuning_init_state_dict_path": "../../x"},
    ]
    write_config(folder, **rng.choice(changes))


@way
def code_of_the_tokenizers(folder, rng):
    write_config(folder, tokenizer_kwargs={"trust_remote_code": True}, tokenizer_name_or_path="../../x")


@way_for_residual
def code_to_import(folder, rng):
    write_config(folder, task_type=None, auto_mapping={"base_model_class": "system", "parent_library": "os"})


@way
def other_json(folder, rng):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(
        rng.choice(
            (
                "[]",
                "null",
                f"[{text}]",
                json.dumps(text),
                text.replace('"', "'"),
                text + "}",
                text.replace(":", ":" + "[" * 100_000, 1),
                "[" * 100_000 + "]" * 100_000,
                text.replace("{", '{"num_virtual_tokens": ' + "9" * 5000 + ",", 1),
                "\ufeff" + text,
            )
        )
    )


@way
def key_that_stands_twice(folder, rng):
    key = rng.choice(sorted(read_config(folder)))
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace("{", "{" + f'"{key}": null, ', 1))


# --- pickles --------------------------------------------------------------------------------------------------------


@way
def pickle_under_another_name(folder, rng):
    bomb = {"prompt_embeddings": Bomb(folder.parent / "executed")}
    path = folder / rng.choice((CONFIG, WEIGHTS))
    rng.choice((lambda: torch.save(bomb, path), lambda: path.write_bytes(pickle.dumps(bomb))))()


@way
def pickle_in_place_of_the_weights(folder, rng):
    (folder / WEIGHTS).unlink()
    torch.save({"prompt_embeddings": Bomb(folder.parent / "executed")}, folder / PICKLE)


@way
def pickle_beside_damaged_weights(folder, rng):
    truncated_weights(folder, rng)
    torch.save({"prompt_embeddings": Bomb(folder.parent / "executed")}, folder / PICKLE)
