"""What is in an adapter's weight file, as plain dictionaries of tensors, and every way in which a file can be bad."""

import json
import pickle
import re

import pytest
import torch
from conftest import WIDTH, make_config, make_encoder, tiny_t5
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_residual import save_as_prompt_tuning
from peft_residual.storage import checkpoint, files


WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def packed(**options):
    """A checkpoint's tensors, its projected prompt and its encoder's state."""
    encoder = make_encoder(**options)
    projected, state = encoder().detach().clone(), encoder.state_dict()
    return checkpoint.pack(projected, state), projected, state


@pytest.fixture
def folder(tmp_path):
    """A saved residual adapter."""
    get_peft_model(tiny_t5(), make_config()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


# --- layout -------------------------------------------------------------------------------------------------------


def test_the_keys_are_those_of_the_documented_format():
    tensors, projected, _ = packed()
    network = ("down.weight", "down.bias", "up.weight", "up.bias", "norm.weight", "norm.bias")
    assert sorted(tensors) == sorted(
        [
            "prompt_embeddings",
            "residual_prompt_tuning.format_version",
            "residual_prompt_tuning.embedding.weight",
            *(f"residual_prompt_tuning.network.{leaf}" for leaf in network),
        ]
    )
    assert torch.equal(tensors["prompt_embeddings"], projected)
    version = tensors["residual_prompt_tuning.format_version"]
    assert version.item() == 1 and version.ndim == 0 and not version.is_floating_point()


def test_the_file_on_disk_has_this_layout(folder):
    assert load_file(folder / WEIGHTS).keys() == packed()[0].keys()


@pytest.mark.parametrize("kind", ("MLP1", "MLP2", "LSTM1", "LSTM2", "LSTM", "TRANSFORMER", "SUPERPOS", "NONE"))
def test_unpacking_gives_back_what_was_packed(kind, tmp_path):
    tensors, projected, state = packed(encoder_reparameterization_type=kind)
    save_file(tensors, tmp_path / WEIGHTS)
    found, found_state, others = checkpoint.unpack(files.read_tensors(tmp_path / WEIGHTS))
    assert torch.equal(found, projected) and others == {}
    assert_same(found_state, state)


def test_heads_that_were_trained_along_are_kept_apart_from_the_prompt():
    tensors, _, state = packed()
    head = {"base_model.classifier.weight": torch.ones(2)}
    _, found_state, others = checkpoint.unpack({**tensors, **head})
    assert_same(others, head)
    assert_same(found_state, state)


def test_stripping_leaves_the_prompt_and_the_heads():
    tensors, projected, _ = packed()
    head = {"base_model.classifier.weight": torch.ones(2)}
    assert_same(checkpoint.strip({**tensors, **head}), {"prompt_embeddings": projected, **head})


def test_packing_and_unpacking_leave_their_arguments_alone():
    tensors, _, state = packed()
    before = dict(tensors), dict(state)
    checkpoint.unpack(tensors)
    checkpoint.strip(tensors)
    assert (tensors.keys(), state.keys()) == (before[0].keys(), before[1].keys())


# --- half a checkpoint, another version ---------------------------------------------------------------------------


def test_a_checkpoint_without_the_projected_prompt_is_refused():
    tensors, _, _ = packed()
    del tensors["prompt_embeddings"]
    with pytest.raises(ValueError, match=r"has no `prompt_embeddings`.*embedding.weight.*save the adapter again"):
        checkpoint.unpack(tensors)


@pytest.mark.parametrize("key", ("embedding.weight", "format_version"))
def test_a_checkpoint_without_raw_prompt_or_version_is_refused(key):
    tensors, _, _ = packed()
    del tensors["residual_prompt_tuning." + key]
    with pytest.raises(ValueError, match=r"without the prompt embedding and its network.*prompt_tuning_init='PROMPT'"):
        checkpoint.unpack(tensors)


@pytest.mark.parametrize("version", (torch.tensor(2), torch.tensor(0), torch.tensor([1, 1]), torch.tensor(1.5)))
def test_an_unknown_version_is_refused(version):
    tensors, _, _ = packed()
    tensors["residual_prompt_tuning.format_version"] = version
    with pytest.raises(ValueError, match=re.escape(f"format version {version.tolist()}") + ".*reads 1.*Upgrade"):
        checkpoint.unpack(tensors)


def test_an_unknown_version_is_named_even_where_the_layout_has_changed():
    tensors = {"prompt_embeddings": torch.zeros(4, WIDTH), "residual_prompt_tuning.format_version": torch.tensor(2)}
    with pytest.raises(ValueError, match="format version 2"):
        checkpoint.unpack(tensors)


# --- another network than the config's ----------------------------------------------------------------------------


def test_equal_leaves_are_accepted_whatever_their_values():
    _, _, state = packed()
    checkpoint.check_leaves(state, {leaf: torch.zeros_like(tensor) for leaf, tensor in state.items()})


def test_every_mismatch_is_named_with_what_was_expected_and_found():
    expected = {"embedding.weight": torch.zeros(4, 16), "network.a": torch.zeros(2), "same": torch.zeros(1)}
    found = {"embedding.weight": torch.zeros(5, 16), "network.b": torch.zeros(3, 1), "same": torch.ones(1)}
    with pytest.raises(ValueError) as error:
        checkpoint.check_leaves(expected, found)
    lines = [line.strip() for line in str(error.value).splitlines() if line.startswith("  ")]
    assert lines == [
        "embedding.weight: expected [4, 16], found [5, 16]",
        "network.a: expected [2], found nothing",
        "network.b: expected nothing, found [3, 1]",
    ]
    assert "adapter_config.json" in str(error.value)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 3))),
    st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 3))),
)
def test_leaves_are_accepted_exactly_when_names_and_shapes_agree(expected, found):
    def tensors(shapes):
        return {leaf: torch.zeros(shape) for leaf, shape in shapes.items()}

    if expected == found:
        checkpoint.check_leaves(tensors(expected), tensors(found))
    else:
        with pytest.raises(ValueError) as error:
            checkpoint.check_leaves(tensors(expected), tensors(found))
        named = set(re.findall(r"^  (\w): ", str(error.value), flags=re.MULTILINE))
        assert named == {leaf for leaf in "abcd" if expected.get(leaf) != found.get(leaf)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder_reparameterization_type": "MLP2"}, ("network.down.weight", "network.0.down.weight", "nothing")),
        ({"encoder_hidden_size": 9}, ("network.down.weight: expected [9, 16], found [8, 16]", "network.up.weight")),
        ({"num_virtual_tokens": 5}, ("embedding.weight: expected [5, 16], found [4, 16]",)),
        ({"encoder_shared": False}, ("network.down.bias: expected [4, 8], found [8]",)),
        ({"encoder_layer_norm": False}, ("network.norm.weight: expected nothing, found [16]",)),
    ],
)
def test_a_checkpoint_for_another_configuration_is_refused_leaf_by_leaf(changes, words, folder):
    config = folder / CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(ValueError) as error:
        PeftModel.from_pretrained(tiny_t5(), folder)
    assert [word for word in words if word not in str(error.value)] == []


def test_a_checkpoint_for_a_model_of_another_width_is_refused(folder):
    with pytest.raises(ValueError, match=r"(?s)(?=.*\b16\b)(?=.*\b32\b)"):
        PeftModel.from_pretrained(tiny_t5(d_model=32), folder)


def test_a_checkpoint_of_another_width_resumed_into_a_live_adapter_is_refused(folder):
    model = get_peft_model(tiny_t5(d_model=32), make_config())
    before = {leaf: tensor.clone() for leaf, tensor in model.prompt_encoder.state_dict().items()}
    with pytest.raises(ValueError, match=r"embedding.weight: expected \[4, 32\], found \[4, 16\]"):
        model.load_adapter(folder, "default", is_trainable=True)
    assert_same(model.prompt_encoder.state_dict(), before)


@pytest.mark.parametrize("changes", ({"encoder_activation": "tanh"}, {"encoder_residual": False}))
def test_a_setting_that_leaves_no_trace_in_the_shapes_is_noticed(changes, folder):
    config = folder / CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(ValueError, match=r"other settings, or is damaged.*encoder_activation"):
        PeftModel.from_pretrained(tiny_t5(), folder)


# --- bad files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", (0, 1, 8, 9, 100, -1, -64))
def test_half_a_weight_file_is_refused(cut, folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=re.escape(f"`{path}` is damaged or not a safetensors file")):
        files.read_tensors(path)
    with pytest.raises(ValueError, match="damaged"):
        PeftModel.from_pretrained(tiny_t5(), folder)


def test_a_missing_weight_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        files.read_tensors(tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"`{re.escape(str(tmp_path))}` has no {WEIGHTS}"):
        files.locate(tmp_path, WEIGHTS)


def test_files_are_located_in_folders_and_subfolders(folder):
    assert files.locate(folder, CONFIG) == folder / CONFIG
    assert files.locate(folder.parent, CONFIG, subfolder="adapter") == folder / CONFIG


@pytest.mark.parametrize("source", ("someone/some-adapter", "not a valid id!", "/no/such/folder"))
def test_a_source_that_is_nowhere_is_refused(source):
    with pytest.raises(ValueError, match=re.escape(f"`{source}` is n")):
        files.locate(source, WEIGHTS)


@pytest.mark.parametrize("content", (b"", b"{", b"\xff\xfe", b"{'a': 1}"))
def test_a_config_that_is_not_json_is_refused(content, tmp_path):
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / CONFIG)) + "` is damaged: not JSON"):
        files.read_config(tmp_path / CONFIG)


@pytest.mark.parametrize("content", ("[]", "3", "null", '"text"'))
def test_a_config_that_is_no_json_object_is_refused(content, tmp_path):
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(ValueError, match="damaged: expected a JSON object"):
        files.read_config(tmp_path / CONFIG)


def with_decoder_rows(folder, num_virtual_tokens):
    """An adapter of PEFT's own prompt tuning for an encoder-decoder model: 4 rows, then 4 that nothing uses."""
    save_file({"prompt_embeddings": torch.zeros(8, WIDTH)}, folder / WEIGHTS)
    values = {"num_transformer_submodules": 2, "num_virtual_tokens": num_virtual_tokens, "peft_type": "PROMPT_TUNING"}
    (folder / CONFIG).write_text(json.dumps(values))
    return folder


def test_the_rows_in_front_of_the_encoder_are_told_from_the_decoders(tmp_path):
    prompt, rows = files.read_prompt(with_decoder_rows(tmp_path, 4))
    assert prompt.shape == (8, WIDTH) and rows == 4


@pytest.mark.parametrize("rows", (None, "4", -1, 3))
def test_a_config_that_does_not_agree_with_its_prompt_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        files.read_prompt(with_decoder_rows(tmp_path, rows))


# --- nothing unpickles --------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))))
def test_a_pickle_under_the_name_of_a_weight_file_is_refused_and_not_opened(write, folder, tmp_path):
    write({"prompt_embeddings": Bomb(tmp_path / "ran")}, folder / WEIGHTS)
    for read in (files.read_prompt, lambda path: PeftModel.from_pretrained(tiny_t5(), path)):
        with pytest.raises(ValueError, match="damaged or not a safetensors file"):
            read(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickled_adapter_is_refused_and_not_opened(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    torch.save({"prompt_embeddings": Bomb(tmp_path / "ran")}, folder / "adapter_model.bin")
    for read in (
        files.read_prompt,
        lambda path: PeftModel.from_pretrained(tiny_t5(), path),
        lambda path: save_as_prompt_tuning(path, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=r"adapter_model.bin, a pickle.*safe_serialization=True"):
            read(folder)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
