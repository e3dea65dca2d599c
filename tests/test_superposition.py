"""SUPERPOS: tokens that are weighted sums of frozen rows of the vocabulary, from start to export."""

import pytest
import torch
from conftest import VOCAB_SIZE, WIDTH, make_config, make_encoder, make_table, tiny_llama, tiny_t5
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from scenarios import SCENARIOS, fresh, outputs_of, train

from peft_residual import (
    ResidualPromptEncoder,
    convert_to_prompt_tuning,
    create_residual_optimizer,
    get_prompt_tensor,
    inspect_prompt,
    register_reparameterization,
    save_as_prefix_tuning,
    save_as_prompt_tuning,
)
from peft_residual.analysis import plot_prompt
from peft_residual.storage.validation import check_adapter


SUPERPOS = {"encoder_reparameterization_type": "SUPERPOS"}
P, M = 4, 8  # of `make_config`
ROWS = "residual_prompt_tuning.network.rows"
WEIGHTS = "adapter_model.safetensors"
LLAMA = SCENARIOS["llama"]


def encoder_of(model):
    return model.prompt_encoder["default"]


def ids_of(rows, table):
    """The row of the table that each row is."""
    equal = (rows.unsqueeze(1) == table.weight.detach().unsqueeze(0)).all(-1)
    assert equal.any(dim=1).all(), "a row is none of the table's"
    return equal.long().argmax(dim=1).tolist()


@pytest.fixture
def folder(tmp_path):
    LLAMA.model(**SUPERPOS).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# --- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ("COMMON_VOCAB", "SAMPLE_VOCAB"))
def test_each_token_starts_as_one_of_distinct_rows_of_the_vocabulary(init):
    table = make_table(padding_idx=7)
    config = make_config(**SUPERPOS, token_dim=WIDTH, prompt_tuning_init=init, prompt_tuning_init_vocab_size=12)
    drawn = set()
    for seed in range(100):
        config.prompt_tuning_init_seed = seed
        encoder = ResidualPromptEncoder(config, table, special_ids=(0, 1))
        ids = ids_of(encoder.network.rows, table)
        assert len(set(ids)) == M
        assert torch.equal(encoder(), table.weight[ids[:P]])
        drawn.update(ids)
    assert drawn == set(range(12 if init == "COMMON_VOCAB" else VOCAB_SIZE)) - {0, 1, 7}


def test_more_tokens_than_rows_start_over_from_the_first_row():
    encoder = make_encoder(**SUPERPOS, num_virtual_tokens=M + 3)
    assert torch.equal(encoder(), encoder.network.rows[[*range(M), 0, 1, 2]])


@pytest.mark.parametrize("init", ("COMMON_VOCAB", "SAMPLE_VOCAB"))
def test_a_vocabulary_of_too_few_rows_is_refused_in_terms_of_the_rows_that_are_mixed(init):
    with pytest.raises(ValueError, match=rf"`encoder_hidden_size`={VOCAB_SIZE + 1} .*Lower `encoder_hidden_size`"):
        make_encoder(**SUPERPOS, encoder_hidden_size=VOCAB_SIZE + 1, prompt_tuning_init=init)


@pytest.mark.parametrize("init", ("RANDOM", "TEXT", "CLASS_LABELS", "PROMPT"))
def test_a_start_that_draws_no_rows_of_the_vocabulary_is_refused(init):
    with pytest.raises(ValueError) as error:
        make_config(**SUPERPOS, prompt_tuning_init=init)
    words = (f"prompt_tuning_init={init!r}", "'SUPERPOS'", "'COMMON_VOCAB' or 'SAMPLE_VOCAB'")
    assert [word for word in words if word not in str(error.value)] == []


# --- training -------------------------------------------------------------------------------------------------------


def test_only_the_weights_are_trained_and_the_rows_stay_as_they_were_drawn():
    model = get_peft_model(tiny_llama(), make_config(**SUPERPOS, task_type="CAUSAL_LM"))
    encoder = encoder_of(model)
    rows, weights = encoder.network.rows.clone(), encoder.embedding.weight.detach().clone()
    assert model.get_nb_trainable_parameters()[0] == P * M
    (group,) = create_residual_optimizer(model, learning_rate=0.01).param_groups
    assert group["name"] == "prompt" and group["params"][0] is encoder.embedding.weight
    train(model, LLAMA, steps=3)
    assert torch.equal(encoder.network.rows, rows)
    assert (encoder.embedding.weight != weights).all(), "also weights that started at zero"


def test_training_goes_on_from_a_folder_as_if_it_had_never_stopped(tmp_path):
    base = tiny_llama()
    straight = LLAMA.model(fresh(base), **SUPERPOS)
    straight.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(fresh(base), tmp_path, is_trainable=True)
    for model in (straight, resumed):
        train(model, LLAMA, steps=2)
    expected = encoder_of(straight).state_dict()
    found = encoder_of(resumed).state_dict()
    assert found.keys() == expected.keys() == {"embedding.weight", "network.rows"}
    assert all(torch.equal(found[leaf], expected[leaf]) for leaf in expected)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_in_half_precision_the_sum_is_computed_in_float32_from_rounded_numbers(dtype):
    encoder = make_encoder(**SUPERPOS).to(dtype)
    rows = encoder.network.rows
    assert rows.dtype == dtype and encoder().dtype == torch.float32
    assert torch.equal(encoder(), rows[:P].float())


def test_a_row_of_a_left_padded_batch_gets_what_it_gets_alone():
    model = LLAMA.model(**SUPERPOS)
    row = torch.randint(3, VOCAB_SIZE, (1, 5))
    ids, mask = (torch.nn.functional.pad(tensor, (3, 0)) for tensor in (row, torch.ones_like(row)))
    with torch.no_grad():
        padded, alone = model(input_ids=ids, attention_mask=mask).logits, model(input_ids=row).logits
    torch.testing.assert_close(padded[:, -5:], alone[:, P:])


# --- saving, exports, reports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCENARIOS)
def test_live_loaded_merged_and_converted_agree_to_the_last_bit(name, tmp_path):
    scenario = SCENARIOS[name]
    base, batch = scenario.build(), scenario.batch()
    model = scenario.model(fresh(base), **SUPERPOS)
    live = outputs_of(model, batch)
    model.save_pretrained(tmp_path / "full")
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(fresh(base), tmp_path / "full", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(outputs_of(loaded, batch), live)
        assert torch.equal(encoder_of(loaded).network.rows, encoder_of(model).network.rows)
    merged = [save_as_prompt_tuning(source, tmp_path / n) for n, source in (("a", model), ("b", tmp_path / "full"))]
    assert (merged[0] / WEIGHTS).read_bytes() == (merged[1] / WEIGHTS).read_bytes()
    assert not any(ROWS in key for key in load_file(merged[0] / WEIGHTS))
    assert torch.equal(load_file(merged[0] / WEIGHTS)["prompt_embeddings"], encoder_of(model)())
    prompt = get_prompt_tensor(model)
    convert_to_prompt_tuning(model)
    assert torch.equal(get_prompt_tensor(model), prompt)


def test_a_prefix_export_computes_what_the_prompt_does(tmp_path):
    base = tiny_llama()
    model = LLAMA.model(fresh(base), **SUPERPOS)
    save_as_prefix_tuning(model, tmp_path / "prefix")
    ids = torch.randint(3, VOCAB_SIZE, (2, 6))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, P:]
        found = PeftModel.from_pretrained(base, tmp_path / "prefix").eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_report_is_of_the_projected_prompt_which_alone_is_a_point_among_the_embeddings(tmp_path):
    base = tiny_t5()
    # As many rows as columns: nothing in the shape of the weights says that they are no prompt.
    model = get_peft_model(base, make_config(**SUPERPOS, encoder_hidden_size=WIDTH, prompt_tuning_init_seed=3))
    report = inspect_prompt(model, k=1)
    assert report.embedding is None and report.embedding_norms is None and report.network_share is None
    assert report.distance_from_initialization.tolist() == [0.0] * P
    found = report.nearest["projected"]["cosine"].ids.flatten().tolist()
    assert found == ids_of(encoder_of(model)(), model.word_embeddings) and list(report.nearest) == ["projected"]
    with torch.no_grad():
        encoder_of(model).embedding.weight[2] *= 3
    report = inspect_prompt(model)
    distances = [0.0, 0.0, 2 * encoder_of(model).network.rows[2].norm().item(), 0.0]
    assert report.distance_from_initialization.tolist() == pytest.approx(distances)
    assert "from initialization" in str(report) and "embedding norm" not in str(report)
    plot_prompt(report)
    model.save_pretrained(tmp_path)
    assert torch.equal(inspect_prompt(tmp_path).projected, get_prompt_tensor(model))
    assert inspect_prompt(tmp_path).embedding is None


def test_check_finds_a_saved_adapter_whole(folder):
    report = check_adapter(folder)
    assert report.is_valid and report.network == "SUPERPOS"
    assert report.shapes[ROWS] == [M, WIDTH]
    assert report.shapes["residual_prompt_tuning.embedding.weight"] == [P, M]


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda tensors: tensors[ROWS][0].mul_(2), ("do not result in its own projected prompt",)),
        (lambda tensors: tensors.pop(ROWS), ("network.rows: expected [8, 16], found nothing",)),
        (
            lambda tensors: tensors.update({ROWS: torch.zeros(M + 1, WIDTH)}),
            ("network.rows: expected [8, 16], found [9, 16]",),
        ),
        (
            lambda tensors: tensors.update({"residual_prompt_tuning.embedding.weight": torch.zeros(P, WIDTH)}),
            ("embedding.weight: expected [4, 8], found [4, 16]",),
        ),
        (lambda tensors: tensors[ROWS][0, 0].fill_(torch.nan), ("NaN", ROWS)),
    ],
    ids=("changed", "missing", "more rows", "a raw prompt", "nan"),
)
def test_rows_and_weights_that_do_not_belong_together_are_refused(damage, words, folder):
    tensors = load_file(folder / WEIGHTS)
    damage(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError) as error:
        PeftModel.from_pretrained(tiny_llama(), folder)
    (finding,) = check_adapter(folder).findings
    assert [word for word in words if word not in str(error.value) or word not in finding] == []


# --- a mix of the user's own ----------------------------------------------------------------------------------------


def test_a_network_of_the_users_own_can_mix_rows(own_names, tmp_path):
    class Average(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.register_buffer("rows", torch.zeros(config.encoder_hidden_size, config.token_dim))

        def forward(self, weights):
            return weights.softmax(dim=-1) @ self.rows

    register_reparameterization("AVERAGE", mixes_vocabulary=True)(Average)
    with pytest.warns(UserWarning, match=r"`encoder_residual`=False has no effect with .*'AVERAGE'"):
        make_config(encoder_reparameterization_type="AVERAGE", encoder_residual=False)
    base = tiny_llama()
    model = LLAMA.model(fresh(base), encoder_reparameterization_type="AVERAGE")
    encoder = encoder_of(model)
    ids_of(encoder.network.rows, model.word_embeddings)
    assert torch.equal(encoder(), encoder.embedding.weight.softmax(dim=-1) @ encoder.network.rows)
    model.save_pretrained(tmp_path)
    assert torch.equal(get_prompt_tensor(PeftModel.from_pretrained(base, tmp_path)), get_prompt_tensor(model))
