"""Every way to start a prompt: which rows, from which source, with which randomness."""

import random
import re

import numpy
import pytest
import torch
from conftest import (
    PAD,
    VOCAB_SIZE,
    WIDTH,
    WORDS,
    make_config,
    make_encoder,
    make_table,
    tiny_bert,
    tiny_gpt2,
    tiny_t5,
)
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import save_file

from peft_residual import (
    ResidualPromptEncoder,
    ResidualPromptTuningConfig,
    register_initialization,
    save_as_prompt_tuning,
)
from peft_residual.initialization import initialize_prompt, most_common_token_ids, sample_rows
from peft_residual.registry import INITIALIZATIONS


FIRST_WORD = 5  # ids 0 to 4 are special or unused
DRAWS = ("RANDOM", "SAMPLE_VOCAB", "COMMON_VOCAB")
KINDS = ("MLP1", "MLP2", "LSTM1", "LSTM2", "LSTM", "TRANSFORMER", "SUPERPOS", "NONE")
KINDS_AND_STARTS = [(k, init) for k in KINDS for init in DRAWS if (k, init) != ("SUPERPOS", "RANDOM")]


def start(table, seed=0, special_ids=(), **options):
    """The raw prompt that a config starts from."""
    config = make_config(**{"token_dim": table.weight.shape[1], **options})
    return initialize_prompt(config, table, torch.Generator().manual_seed(seed), special_ids)


def ids_of(prompt, table):
    """The row of the table that each row of the prompt is."""
    equal = (prompt.unsqueeze(1) == table.weight.detach().unsqueeze(0)).all(-1)
    assert equal.any(dim=1).all(), "a row of the prompt is no row of the table"
    return equal.long().argmax(dim=1).tolist()


# --- RANDOM -----------------------------------------------------------------------------------------------------


def test_random_is_uniform_between_minus_and_plus_one_half():
    prompt = start(make_table(), prompt_tuning_init="RANDOM", num_virtual_tokens=500)
    assert prompt.shape == (500, WIDTH)
    assert -0.5 <= prompt.min() < -0.49 and 0.49 < prompt.max() <= 0.5
    assert prompt.var().item() == pytest.approx(1 / 12, rel=0.05)


# --- rows of the vocabulary -------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ("SAMPLE_VOCAB", "COMMON_VOCAB"))
def test_vocabulary_starts_are_distinct_rows_of_the_table(init):
    table = make_table()
    for seed in range(20):
        prompt = start(table, seed, prompt_tuning_init=init, num_virtual_tokens=10)
        assert prompt.dtype == torch.float32 and not prompt.requires_grad
        assert len(set(ids_of(prompt, table))) == 10


@pytest.mark.parametrize("init", ("SAMPLE_VOCAB", "COMMON_VOCAB"))
def test_every_usable_row_is_drawn_and_no_special_padding_or_unused_one(init, tokenizer_folder, tokenizer):
    table = make_table(padding_idx=7)
    options = {"prompt_tuning_init": init, "tokenizer_name_or_path": tokenizer_folder, "num_virtual_tokens": 10}
    drawn = {i for seed in range(60) for i in ids_of(start(table, seed, special_ids=(9, 11), **options), table)}
    # Not 0 to 4 (special, unused), 7 (padding), 9 and 11 (the model's), nor the rows past the tokenizer's end.
    assert drawn == set(range(FIRST_WORD, len(tokenizer))) - {7, 9, 11}


@pytest.mark.parametrize("init", ("SAMPLE_VOCAB", "COMMON_VOCAB"))
def test_without_a_tokenizer_the_padding_row_and_the_models_special_ids_are_passed_over(init):
    table = make_table(padding_idx=7)
    options = {"prompt_tuning_init": init, "num_virtual_tokens": 10}
    drawn = {i for seed in range(60) for i in ids_of(start(table, seed, special_ids=(0, 63), **options), table)}
    assert drawn == set(range(VOCAB_SIZE)) - {0, 7, 63}


@pytest.mark.parametrize("build", (tiny_t5, tiny_bert))
def test_the_special_ids_of_the_model_are_known_without_asking(build):
    model = build(vocab_size=8)
    config = make_config(task_type="FEATURE_EXTRACTION", num_virtual_tokens=6)  # all rows but padding and end
    peft_model = get_peft_model(model, config)
    table = model.get_input_embeddings()
    assert sorted(ids_of(peft_model.prompt_encoder["default"].embedding.weight, table)) == [2, 3, 4, 5, 6, 7]


def test_common_vocabulary_is_the_first_rows():
    table = make_table()
    options = {"prompt_tuning_init_vocab_size": 12, "num_virtual_tokens": 6}
    assert {i for seed in range(40) for i in ids_of(start(table, seed, **options), table)} == set(range(12))


def test_common_vocabulary_follows_the_given_order_of_token_ids():
    table = make_table()
    order = [40, 41, 42, 43, 40, 44, 45, 46]
    drawn = set()
    for seed in range(40):
        prompt = start(table, seed, prompt_tuning_init_token_ids=order, prompt_tuning_init_vocab_size=5)
        drawn.update(ids_of(prompt, table))
    assert drawn == {40, 41, 42, 43, 44}  # the first five different ones


def test_the_draw_is_random():
    table = make_table()
    assert len({tuple(ids_of(start(table, seed), table)) for seed in range(20)}) == 20


def test_excluding_a_row_does_not_change_the_others_that_are_drawn():
    table = make_table()
    everything = range(VOCAB_SIZE)
    generator = torch.Generator()
    before = ids_of(sample_rows(table, 6, candidates=everything, generator=generator.manual_seed(3)), table)
    rows = sample_rows(table, 6, candidates=everything, exclude_ids=[before[0]], generator=generator.manual_seed(3))
    assert ids_of(rows, table)[:5] == before[1:]


@pytest.mark.parametrize(
    ("options", "found", "of"),
    [
        ({"prompt_tuning_init": "SAMPLE_VOCAB", "num_virtual_tokens": 64}, 62, 64),
        ({"num_virtual_tokens": 64}, 62, 64),
        ({"num_virtual_tokens": 6, "prompt_tuning_init_vocab_size": 7}, 5, 7),
        ({"num_virtual_tokens": 6, "prompt_tuning_init_token_ids": [0, 1, 2, 3, 4, 5]}, 4, 6),
    ],
)
def test_fewer_usable_rows_than_virtual_tokens_are_refused(options, found, of):
    with pytest.raises(ValueError) as error:
        start(make_table(), special_ids=(0, 1), **options)
    words = (
        f"`num_virtual_tokens`={options['num_virtual_tokens']}",
        f"{found} of {of}",
        "prompt_tuning_init_vocab_size",
        "`prompt_tuning_init`",
    )
    assert [word for word in words if word not in str(error.value)] == []


def test_token_ids_past_the_table_are_refused():
    with pytest.raises(ValueError, match=r"`prompt_tuning_init_token_ids` contains 64, .* 64 rows"):
        start(make_table(), prompt_tuning_init_token_ids=[5, 6, 64, 7])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_the_start_is_float32_and_a_copy(dtype):
    table = make_table().to(dtype)
    before = table.weight.detach().clone()
    prompt = start(table)
    assert prompt.dtype == torch.float32
    prompt.zero_()
    assert torch.equal(table.weight, before)


def test_rows_are_read_through_the_embedding_module():
    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 4

    table = Scaled(VOCAB_SIZE, WIDTH)
    plain = make_table()
    plain.weight.data = table.weight.data * 4
    assert len(ids_of(start(table), plain)) == 4


# --- most common token ids --------------------------------------------------------------------------------------


def token(word):
    return FIRST_WORD + WORDS.index(word)


def test_token_ids_are_counted_with_ties_by_id(tokenizer):
    texts = ["green red good", "red bad good", "bad good"]
    # good 3, then bad (id 6) and red (id 9) twice each, though red comes first in the texts, then green
    expected = [token("good"), token("bad"), token("red"), token("green")]
    assert most_common_token_ids(texts, tokenizer) == expected
    assert most_common_token_ids(iter(texts), tokenizer, limit=2) == expected[:2]


def test_special_tokens_are_not_counted(tokenizer):
    texts = ["</s> <pad> strangeword good", "</s> another strangeword"]
    assert most_common_token_ids(texts, tokenizer) == [token("good")]


@pytest.mark.parametrize("texts", ([], [""], ["</s> strangeword"]))
def test_texts_without_an_ordinary_token_are_refused(texts, tokenizer):
    with pytest.raises(ValueError, match="`texts` contains no ordinary token"):
        most_common_token_ids(texts, tokenizer)


@pytest.mark.parametrize("limit", (0, -1))
def test_a_limit_below_one_is_refused(limit, tokenizer):
    with pytest.raises(ValueError, match=f"`limit`.*{limit}"):
        most_common_token_ids(["good"], tokenizer, limit=limit)


def test_one_text_instead_of_a_list_is_refused(tokenizer):
    with pytest.raises(ValueError, match="`texts` must be a list"):
        most_common_token_ids("good bad", tokenizer)


def test_counted_ids_are_a_start(tokenizer):
    table = make_table()
    ids = most_common_token_ids(["good bad red green"], tokenizer)
    assert sorted(ids_of(start(table, prompt_tuning_init_token_ids=ids), table)) == sorted(ids)


# --- TEXT and CLASS_LABELS --------------------------------------------------------------------------------------


def test_a_short_text_is_repeated(tokenizer_folder, recwarn):
    table = make_table()
    options = {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": tokenizer_folder, "num_virtual_tokens": 7}
    prompt = start(table, prompt_tuning_init_text="good red film", **options)
    words = ["good", "red", "film", "good", "red", "film", "good"]
    assert ids_of(prompt, table) == [token(word) for word in words]
    assert not recwarn.list


def test_a_long_text_is_cut_with_a_warning(tokenizer_folder):
    table = make_table()
    options = {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": tokenizer_folder, "num_virtual_tokens": 2}
    with pytest.warns(UserWarning, match=r"`prompt_tuning_init_text` has 3 tokens, .* first 2"):
        prompt = start(table, prompt_tuning_init_text="good red film", **options)
    assert ids_of(prompt, table) == [token("good"), token("red")]


def test_without_a_length_the_prompt_is_as_long_as_its_text(tokenizer_folder, recwarn):
    table = make_table()
    options = {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": tokenizer_folder, "num_virtual_tokens": None}
    prompt = start(table, prompt_tuning_init_text="good red film", **options)
    assert ids_of(prompt, table) == [token(word) for word in ("good", "red", "film")]
    assert not recwarn.list


def test_a_loaded_config_without_a_length_loads_no_tokenizer(tokenizer_folder, monkeypatch):
    """Its name would come from the file, as would `trust_remote_code`."""
    monkeypatch.setattr(ResidualPromptTuningConfig, "load_tokenizer", lambda self: pytest.fail("loaded a tokenizer"))
    options = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "good",
        "tokenizer_name_or_path": "someone/else",
    }
    values = {**options, "task_type": "CAUSAL_LM", "peft_type": "RESIDUAL_PROMPT_TUNING", "num_virtual_tokens": None}
    with pytest.raises(ValueError, match="`num_virtual_tokens`"):
        ResidualPromptTuningConfig(**values)


@pytest.mark.parametrize("missing", ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"))
def test_a_length_is_needed_without_a_text(missing, tokenizer_folder):
    options = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "good red film",
        "tokenizer_name_or_path": tokenizer_folder,
    }
    del options[missing]
    with pytest.raises(ValueError, match="`num_virtual_tokens`=None takes the length of a text"):
        make_config(num_virtual_tokens=None, **options)


def test_a_text_without_tokens_is_refused(tokenizer_folder):
    options = {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": tokenizer_folder}
    with pytest.raises(ValueError, match="`prompt_tuning_init_text`='  ' has no tokens"):
        start(make_table(), prompt_tuning_init_text="  ", **options)


def labels(tokenizer_folder, *words, **options):
    named = {"prompt_tuning_init": "CLASS_LABELS", "prompt_tuning_init_class_labels": list(words)}
    return {**named, "tokenizer_name_or_path": tokenizer_folder, **options}


def test_class_labels_come_first_then_common_vocabulary(tokenizer_folder):
    table = make_table()
    rest = set()
    for seed in range(40):
        prompt = start(
            table,
            seed,
            **labels(tokenizer_folder, "yes", "no", prompt_tuning_init_vocab_size=12, num_virtual_tokens=5),
        )
        ids = ids_of(prompt, table)
        assert ids[:2] == [token("yes"), token("no")] and len(set(ids)) == 5
        rest.update(ids[2:])
    assert rest == set(range(FIRST_WORD, 12))


def test_a_label_of_several_tokens_is_their_mean(tokenizer_folder):
    table = make_table()
    prompt = start(table, **labels(tokenizer_folder, "good film", "no", num_virtual_tokens=2))
    expected = (table.weight[token("good")] + table.weight[token("film")]) / 2
    torch.testing.assert_close(prompt[0], expected.detach())
    assert torch.equal(prompt[1], table.weight[token("no")])


def test_common_vocabulary_after_labels_does_not_repeat_them(tokenizer_folder):
    table = make_table()
    for seed in range(30):
        options = labels(
            tokenizer_folder, WORDS[0], WORDS[1], prompt_tuning_init_vocab_size=FIRST_WORD + 5, num_virtual_tokens=5
        )
        assert len(set(ids_of(start(table, seed, **options), table))) == 5


@pytest.mark.parametrize("label", ("strangeword", "good strangeword", "  "))
def test_a_label_that_the_tokenizer_does_not_know_is_refused(label, tokenizer_folder):
    with pytest.raises(ValueError, match=f"`prompt_tuning_init_class_labels` contains {label!r}"):
        start(make_table(), **labels(tokenizer_folder, label))


# --- PROMPT -----------------------------------------------------------------------------------------------------


def from_prompt(path, **options):
    named = {"prompt_tuning_init": "PROMPT", "prompt_tuning_init_state_dict_path": str(path)}
    return start(make_table(), **named, **options)


@pytest.fixture
def residual_folder(tmp_path):
    """A saved residual adapter, and the projected prompt that it was saved with."""
    model = get_peft_model(tiny_t5(), make_config())
    model.save_pretrained(tmp_path / "residual")
    return tmp_path / "residual", model.prompt_encoder["default"]().detach()


def test_a_residual_adapter_gives_its_projected_prompt(residual_folder):
    folder, projected = residual_folder
    assert torch.equal(from_prompt(folder), projected)


def test_a_merged_adapter_gives_its_prompt(residual_folder, tmp_path):
    folder, projected = residual_folder
    save_as_prompt_tuning(folder, tmp_path / "merged")
    assert torch.equal(from_prompt(tmp_path / "merged"), projected)


@pytest.mark.parametrize("submodules", (None, 1, 2))
def test_an_adapter_of_plain_prompt_tuning_gives_the_rows_in_front_of_the_encoder(submodules, tmp_path):
    plain = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_transformer_submodules=submodules)
    model = get_peft_model(tiny_t5(), plain)
    model.save_pretrained(tmp_path)
    weight = model.prompt_encoder["default"].embedding.weight
    assert len(weight) == (4 if submodules == 1 else 8)
    assert torch.equal(from_prompt(tmp_path), weight[:4])


@pytest.mark.parametrize("network", ("MLP", "LSTM"))
@pytest.mark.parametrize("build, task_type", [(tiny_t5, "SEQ_2_SEQ_LM"), (tiny_gpt2, "CAUSAL_LM")])
def test_an_adapter_of_p_tuning_gives_what_its_network_made(build, task_type, network, tmp_path):
    config = PromptEncoderConfig(task_type=task_type, num_virtual_tokens=4, encoder_reparameterization_type=network)
    model = get_peft_model(build(), config)
    model.save_pretrained(tmp_path)
    assert torch.equal(from_prompt(tmp_path), model.get_prompt_embedding_to_save("default")[:4])


@pytest.mark.parametrize("build, task_type", [(tiny_t5, "SEQ_2_SEQ_LM"), (tiny_gpt2, "CAUSAL_LM")])
@pytest.mark.parametrize(
    "config_class, options",
    [(PrefixTuningConfig, {}), (MultitaskPromptTuningConfig, {"num_tasks": 2}), (LoraConfig, {})],
)
def test_an_adapter_of_another_kind_is_refused_by_its_name(config_class, options, build, task_type, tmp_path):
    if config_class is not LoraConfig:
        options = {"num_virtual_tokens": 4, **options}
    config = config_class(task_type=task_type, **options)
    get_peft_model(build(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`peft_type`='{config.peft_type.value}'.*P_TUNING"):
        from_prompt(tmp_path)


@pytest.mark.parametrize("key", ("prompt_embeddings", "prompt"))
def test_a_tensor_in_a_safetensors_file_is_read(key, tmp_path):
    prompt = torch.randn(4, WIDTH)
    save_file({key: prompt}, tmp_path / "prompt.safetensors")
    assert torch.equal(from_prompt(tmp_path / "prompt.safetensors"), prompt)


@pytest.mark.parametrize("dtype", ("float16", "float32", "float64"))
def test_an_array_in_an_npy_file_is_read(dtype, tmp_path):
    prompt = numpy.random.default_rng(0).normal(size=(4, WIDTH)).astype(dtype)
    numpy.save(tmp_path / "prompt.npy", prompt)
    assert torch.equal(from_prompt(tmp_path / "prompt.npy"), torch.from_numpy(prompt).float())


def test_a_bfloat16_prompt_starts_in_float32(tmp_path):
    prompt = torch.randn(4, WIDTH).bfloat16()
    save_file({"prompt": prompt}, tmp_path / "prompt.safetensors")
    start = from_prompt(tmp_path / "prompt.safetensors")
    assert start.dtype == torch.float32 and torch.equal(start, prompt.float())


def test_the_model_that_starts_from_a_prompt_sees_it_when_there_is_no_network(residual_folder):
    folder, projected = residual_folder
    named = {"prompt_tuning_init": "PROMPT", "prompt_tuning_init_state_dict_path": str(folder)}
    model = get_peft_model(tiny_t5(), make_config(encoder_reparameterization_type="NONE", **named))
    assert torch.equal(model.prompt_encoder["default"](), projected)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, WIDTH), ("3 tokens of width 16", "expected 4", "`num_virtual_tokens`", "num_virtual_tokens=3")),
        ((5, WIDTH), ("5 tokens of width 16", "expected 4", "num_virtual_tokens=5")),
        ((4, 8), ("4 tokens of width 8", "of width 16", "base model")),
        ((4,), ("[4]", "two dimensions")),
        ((1, 4, WIDTH), ("[1, 4, 16]", "two dimensions")),
    ],
)
@pytest.mark.parametrize("suffix", ("safetensors", "npy"))
def test_a_prompt_of_another_length_or_width_is_refused(shape, words, suffix, tmp_path):
    path = tmp_path / f"prompt.{suffix}"
    if suffix == "npy":
        numpy.save(path, numpy.zeros(shape, dtype="float32"))
    else:
        save_file({"prompt": torch.zeros(shape)}, path)
    with pytest.raises(ValueError) as error:
        from_prompt(path)
    assert [word for word in (str(path), *words) if word not in str(error.value)] == []


@pytest.mark.parametrize("name", ("nothing", "nothing.npy", "nothing.safetensors", "no/such/folder", "no such id!"))
def test_a_missing_source_is_refused(name, tmp_path):
    path = tmp_path / name
    with pytest.raises(ValueError, match=re.escape(str(path))):
        from_prompt(path)


@pytest.mark.parametrize("name", ("prompt.safetensors", "prompt.npy", "adapter_model.safetensors"))
@pytest.mark.parametrize("content", (b"", b"half a file", b"\x93NUMPY\x01\x00", b"\x08\0\0\0\0\0\0\0{}"))
def test_a_damaged_source_is_refused(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged|holds"):
        from_prompt(tmp_path if name.startswith("adapter") else path)


@pytest.mark.parametrize("suffix", ("npy", "safetensors"))
def test_a_file_that_was_cut_off_is_refused(suffix, tmp_path):
    whole, half = tmp_path / f"whole.{suffix}", tmp_path / f"half.{suffix}"
    if suffix == "npy":
        numpy.save(whole, numpy.zeros((4, WIDTH), dtype="float32"))
    else:
        save_file({"prompt": torch.zeros(4, WIDTH)}, whole)
    half.write_bytes(whole.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"half\..*damaged"):
        from_prompt(half)


def test_a_folder_with_half_an_adapter_is_refused(residual_folder):
    folder, _ = residual_folder
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_config.json"):
        from_prompt(folder)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickled_adapter_is_refused_and_not_opened(tmp_path):
    torch.save({"prompt_embeddings": Bomb(tmp_path / "ran")}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin, a pickle"):
        from_prompt(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_array_of_objects_is_refused_and_not_opened(tmp_path):
    array = numpy.empty(1, dtype=object)
    array[0] = Bomb(tmp_path / "ran")
    numpy.save(tmp_path / "prompt.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match="damaged or not an array"):
        from_prompt(tmp_path / "prompt.npy")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", ("int64", "bool"))
def test_a_tensor_that_is_no_floating_point_one_is_refused(dtype, tmp_path):
    numpy.save(tmp_path / "prompt.npy", numpy.ones((4, WIDTH), dtype=dtype))
    with pytest.raises(ValueError, match="floating-point"):
        from_prompt(tmp_path / "prompt.npy")


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_prompt_that_is_not_finite_is_refused(value, tmp_path):
    prompt = torch.zeros(4, WIDTH)
    prompt[1, 2] = value
    save_file({"prompt": prompt}, tmp_path / "prompt.safetensors")
    with pytest.raises(ValueError, match=r"finite|NaN|nan"):
        from_prompt(tmp_path / "prompt.safetensors")


# --- randomness -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, init", KINDS_AND_STARTS)
def test_the_same_seed_gives_the_same_prompt_and_network_and_another_seed_others(kind, init):
    options = {"encoder_reparameterization_type": kind, "prompt_tuning_init": init, "token_dim": WIDTH}
    table = make_table()
    states = []
    for number, seed in enumerate((7, 7, 8)):
        torch.manual_seed(number)  # what the global generator does is of no account
        config = make_config(prompt_tuning_init_seed=seed, **options)
        states.append(ResidualPromptEncoder(config, table).state_dict())
    for leaf in states[0]:
        assert torch.equal(states[0][leaf], states[1][leaf]), leaf
        if len(states[0][leaf].unique()) > 2:  # norms and the weights of a mix start at ones and zeros
            assert not torch.equal(states[0][leaf], states[2][leaf]), leaf


def test_prompt_and_network_do_not_start_from_the_same_numbers():
    encoder = make_encoder(prompt_tuning_init="RANDOM", token_dim=8, num_virtual_tokens=8, encoder_hidden_size=8)
    raw = encoder.embedding.weight.flatten()
    weight = encoder.network.down.weight.flatten()
    assert torch.corrcoef(torch.stack([raw, weight]))[0, 1].abs() < 0.5


def test_without_a_seed_the_start_follows_torchs():
    table = make_table()
    states = []
    for seed, used in ((1, 0), (1, 9), (2, 0)):
        torch.manual_seed(seed)
        torch.rand(used)
        states.append(ResidualPromptEncoder(make_config(token_dim=WIDTH), table).state_dict())
    first, again, other = states
    assert all(torch.equal(first[leaf], again[leaf]) for leaf in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])
    assert not torch.equal(first["network.down.weight"], other["network.down.weight"])


@pytest.mark.parametrize("seed", (None, 3))
@pytest.mark.parametrize("kind, init", KINDS_AND_STARTS)
def test_building_an_encoder_leaves_every_global_random_state_as_it_was(kind, init, seed):
    table = make_table()
    options = {"encoder_reparameterization_type": kind, "prompt_tuning_init": init, "token_dim": WIDTH}
    states = torch.get_rng_state(), torch.initial_seed(), numpy.random.get_state(), random.getstate()
    encoder = ResidualPromptEncoder(make_config(prompt_tuning_init_seed=seed, **options), table)
    encoder.requires_grad_(False)()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.initial_seed() == states[1]
    assert all(numpy.array_equal(a, b) for a, b in zip(numpy.random.get_state(), states[2], strict=True))
    assert random.getstate() == states[3]


def test_get_peft_model_leaves_the_global_random_state_as_it_was():
    base = tiny_t5()
    before = torch.get_rng_state()
    get_peft_model(base, make_config())
    assert torch.equal(torch.get_rng_state(), before)


# --- starts of the user's own -----------------------------------------------------------------------------------


def test_a_start_of_the_users_own_is_used_and_gets_config_table_and_generator(own_names):
    @register_initialization("MEAN")
    def mean_row(config, word_embeddings, generator):
        noise = torch.randn(config.total_virtual_tokens, config.token_dim, generator=generator)
        return word_embeddings.weight.mean(dim=0, keepdim=True) + 1e-3 * noise

    base = tiny_t5()
    model = get_peft_model(base, make_config(prompt_tuning_init="MEAN", prompt_tuning_init_seed=1))
    raw = model.prompt_encoder["default"].embedding.weight
    mean = base.get_input_embeddings().weight.mean(dim=0).expand(4, -1)
    torch.testing.assert_close(raw, mean, rtol=0, atol=0.01)
    assert raw.requires_grad and len(raw.unique(dim=0)) == 4


def test_a_start_of_the_users_own_may_read_any_option(own_names):
    @register_initialization("OWN_TEXT")
    def own_text(config, word_embeddings, generator):
        return torch.full((4, config.token_dim), float(len(config.prompt_tuning_init_text)))

    assert (start(make_table(), prompt_tuning_init="OWN_TEXT", prompt_tuning_init_text="good") == 4).all()


def test_a_start_of_another_shape_is_refused(own_names):
    @register_initialization("SHORT")
    def short(config, word_embeddings, generator):
        return torch.zeros(3, config.token_dim)

    with pytest.raises(ValueError, match=r"'SHORT' made a prompt of shape \(3, 16\), expected \(4, 16\)"):
        start(make_table(), prompt_tuning_init="SHORT")


def test_an_adapter_is_loaded_without_its_start(own_names, tmp_path):
    from peft import PeftModel

    @register_initialization("GONE")
    def zeros(config, word_embeddings, generator):
        return torch.zeros(4, config.token_dim)

    get_peft_model(tiny_t5(), make_config(prompt_tuning_init="GONE")).save_pretrained(tmp_path)
    INITIALIZATIONS._entries["GONE"] = type(INITIALIZATIONS["GONE"])(lambda *_: pytest.fail("the start ran again"))
    loaded = PeftModel.from_pretrained(tiny_t5(), tmp_path)
    assert (loaded.prompt_encoder["default"].embedding.weight == 0).all()


def test_a_taken_name_is_refused(own_names):
    with pytest.raises(ValueError, match="'RANDOM' is already registered"):

        @register_initialization("RANDOM")
        def other(config, word_embeddings, generator):
            return None


def test_the_padding_row_of_a_model_is_never_a_start():
    model = tiny_t5()
    encoder = get_peft_model(model, make_config(num_virtual_tokens=60)).prompt_encoder["default"]
    assert PAD not in ids_of(encoder.embedding.weight, model.get_input_embeddings())
