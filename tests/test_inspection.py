"""What is said of a prompt is what plain torch finds in its tensors."""

import json

import pytest
import torch
from conftest import WIDTH, WORDS, make_config, tiny_llama, tiny_t5
from peft import PeftModel, PromptTuningConfig, get_peft_model
from scenarios import SCENARIOS

from peft_residual import convert_to_prompt_tuning, inspect_prompt
from peft_residual.analysis import nearest_tokens


@pytest.fixture(scope="module")
def model():
    """A trained residual prompt of four tokens on a T5."""
    torch.manual_seed(0)
    return SCENARIOS["t5"].model()


def raw_prompt(model):
    return model.prompt_encoder["default"].embedding.weight.detach()


def projected_prompt(model):
    return model.get_prompt_embedding_to_save("default")


def set_raw_prompt(model, rows):
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(rows)


# --- nearest tokens --------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_words_is_nearest_to_them():
    model = get_peft_model(tiny_t5(), make_config(encoder_reparameterization_type="NONE"))
    table = model.word_embeddings.weight.detach()
    set_raw_prompt(model, table[[7, 30, 9, 63]])
    found = nearest_tokens(model, k=3)
    assert found.keys() == {"projected", "embedding"} and found["embedding"].keys() == {"cosine", "euclidean"}
    for prompt in found.values():
        for metric, value in (("cosine", 1.0), ("euclidean", 0.0)):
            assert prompt[metric].ids[:, 0].tolist() == [7, 30, 9, 63]
            assert prompt[metric].ids.shape == prompt[metric].values.shape == (4, 3)
            torch.testing.assert_close(prompt[metric].values[:, 0], torch.full((4,), value), rtol=0, atol=1e-6)
            assert torch.equal(prompt[metric].rows[:, 0], table[[7, 30, 9, 63]])
            assert [tokens[0] for tokens in prompt[metric].tokens] == ["#7", "#30", "#9", "#63"]


def test_the_two_metrics_are_those_of_the_formulas(model):
    table = model.word_embeddings.weight.detach()
    found = nearest_tokens(model, k=64)
    for name, prompt in (("embedding", raw_prompt(model)), ("projected", projected_prompt(model))):
        cosine = torch.nn.functional.cosine_similarity(prompt[:, None], table[None], dim=-1)
        distance = (prompt[:, None] - table[None]).square().sum(-1).sqrt()
        for metric, expected in (("cosine", cosine.sort(descending=True)), ("euclidean", distance.sort())):
            torch.testing.assert_close(found[name][metric].values, expected.values, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[name]["cosine"].ids, cosine.sort(descending=True).indices)


def test_a_distance_of_nothing_is_nothing_far_from_the_origin():
    """By way of a product of matrices it would be of the size of the rounding errors of large numbers."""
    model = get_peft_model(tiny_t5(), make_config(encoder_reparameterization_type="NONE", num_virtual_tokens=30))
    model.word_embeddings.weight.data.add_(1000)
    set_raw_prompt(model, model.word_embeddings.weight[:30].detach())
    assert nearest_tokens(model, k=1)["embedding"]["euclidean"].values.eq(0).all()


def test_a_large_vocabulary_is_compared_in_parts(model, monkeypatch):
    whole = nearest_tokens(model, k=4)
    monkeypatch.setattr("peft_residual.analysis.nearest._ROWS_AT_ONCE", 7)
    parts = nearest_tokens(model, k=4)
    for name in whole:
        for metric in whole[name]:
            assert torch.equal(whole[name][metric].ids, parts[name][metric].ids)


def test_with_a_tokenizer_ids_become_words_and_rows_past_its_end_are_not_words(model, tokenizer):
    found = nearest_tokens(model, tokenizer, k=64)["projected"]["cosine"]
    assert found.ids.shape == (4, len(tokenizer)) and found.ids.max() == len(tokenizer) - 1
    assert set(found.tokens[0]) >= set(WORDS) | {"</s>"}
    assert tokenizer.convert_tokens_to_ids(found.tokens[2]) == found.ids[2].tolist()


def test_a_model_that_scales_its_embeddings_is_read_through_its_module():
    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 10

    base = tiny_llama()
    scaled = Scaled(*base.get_input_embeddings().weight.shape)
    base.set_input_embeddings(scaled)
    model = get_peft_model(base, make_config(task_type="CAUSAL_LM", encoder_reparameterization_type="NONE"))
    set_raw_prompt(model, scaled.weight[[5, 6, 7, 8]].detach() * 10)
    nearest = nearest_tokens(model, k=1)["embedding"]["euclidean"]
    assert nearest.ids.flatten().tolist() == [5, 6, 7, 8] and nearest.values.eq(0).all()


@pytest.mark.parametrize("k", (0, -1, 1.5, True, None))
def test_a_number_of_neighbours_that_cannot_be_is_refused(k, model):
    with pytest.raises(ValueError, match="`k` must be an integer of at least 1"):
        inspect_prompt(model, k=k)


def test_a_number_of_neighbours_is_checked_for_a_folder_too(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`k` must be an integer of at least 1, got 0"):
        inspect_prompt(tmp_path, k=0)


# --- norms, share, similarity ----------------------------------------------------------------------------------------


def test_norms_and_their_ranks_are_those_of_the_formulas():
    model = get_peft_model(tiny_t5(), make_config(encoder_reparameterization_type="NONE"))
    table = model.word_embeddings.weight.detach()
    set_raw_prompt(model, torch.stack([table[5], table[6] * 1.01, table[7] * 0, table[8] * 9]))
    report = inspect_prompt(model)
    torch.testing.assert_close(report.norms, projected_prompt(model).square().sum(1).sqrt())
    torch.testing.assert_close(report.embedding_norms, raw_prompt(model).square().sum(1).sqrt())
    torch.testing.assert_close(report.vocabulary_norms, table.square().sum(1).sqrt().sort().values)
    shorter = [(table.norm(dim=1) < norm).float().mean().item() for norm in report.norms]
    assert report.norm_ranks.tolist() == pytest.approx(shorter)
    assert 0 < shorter[0] < 1 and shorter[2:] == [0, 1]


def test_similarity_is_the_cosine_between_projected_tokens(model):
    similarity = inspect_prompt(model).similarity
    prompt = projected_prompt(model)
    expected = torch.nn.functional.cosine_similarity(prompt[:, None], prompt[None], dim=-1)
    torch.testing.assert_close(similarity, expected)


def test_the_networks_share_is_the_length_of_what_it_adds(model):
    added = model.prompt_encoder["default"].network.eval()(raw_prompt(model)).detach().norm(dim=1)
    expected = added / (added + raw_prompt(model).norm(dim=1))
    torch.testing.assert_close(inspect_prompt(model).network_share, expected)


@pytest.mark.parametrize(
    ("options", "share"), [({"encoder_reparameterization_type": "NONE"}, 0.0), ({"encoder_residual": False}, 1.0)]
)
def test_the_networks_share_is_nothing_without_a_network_and_all_without_a_skip(options, share):
    model = get_peft_model(tiny_t5(), make_config(**options))
    assert inspect_prompt(model).network_share.tolist() == [share] * 4


# --- distance from the start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ("COMMON_VOCAB", "SAMPLE_VOCAB", "RANDOM"))
def test_an_untrained_prompt_has_not_moved_and_a_moved_one_has(init, tmp_path):
    base = tiny_t5()
    model = get_peft_model(base, make_config(prompt_tuning_init=init, prompt_tuning_init_seed=3))
    assert inspect_prompt(model).distance_from_initialization.tolist() == [0.0] * 4
    step = torch.zeros(4, WIDTH)
    step[2, :2] = torch.tensor([3.0, 4.0])
    set_raw_prompt(model, raw_prompt(model) + step)
    model.save_pretrained(tmp_path)
    for moved in (model, PeftModel.from_pretrained(base, tmp_path)):
        report = inspect_prompt(moved)
        assert report.distance_from_initialization.tolist() == pytest.approx([0.0, 0.0, 5.0, 0.0], abs=1e-5)
        assert report.initialization_error is None


def test_a_start_by_text_needs_no_seed(tokenizer_folder):
    options = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "good bad"}
    model = get_peft_model(tiny_t5(), make_config(**options, tokenizer_name_or_path=tokenizer_folder))
    assert inspect_prompt(model).distance_from_initialization.tolist() == [0.0] * 4


def test_a_start_that_cannot_be_made_again_is_none_with_the_reason(tokenizer_folder, tmp_path):
    model = get_peft_model(tiny_t5(), make_config())
    report = inspect_prompt(model)
    assert report.distance_from_initialization is None and "`prompt_tuning_init_seed`" in report.initialization_error
    model = SCENARIOS["t5"].model()
    model.peft_config["default"].tokenizer_name_or_path = str(tmp_path / "gone")
    report = inspect_prompt(model)
    assert report.distance_from_initialization is None and "gone" in report.initialization_error
    assert "not known" in str(report)


def test_looking_changes_nothing(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, state = model.peft_config["default"].to_dict(), torch.get_rng_state()
    inspect_prompt(model)
    assert model.peft_config["default"].to_dict() == config and torch.equal(torch.get_rng_state(), state)
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])] == []


# --- folders, plain prompts ------------------------------------------------------------------------------------------


def test_a_folder_says_what_needs_no_base_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    report, live = inspect_prompt(tmp_path), inspect_prompt(model)
    for name in ("projected", "embedding", "norms", "embedding_norms", "network_share", "similarity"):
        torch.testing.assert_close(getattr(report, name), getattr(live, name))
    assert report.name == str(tmp_path) and report.nearest == {}
    assert report.vocabulary_norms is report.norm_ranks is report.distance_from_initialization is None
    assert "base model" in report.initialization_error


def test_a_plain_prompt_has_no_network_and_no_start():
    plain = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    merged = SCENARIOS["llama"].model()
    convert_to_prompt_tuning(merged)
    for model in (plain, merged):
        report = inspect_prompt(model)
        assert (
            report.embedding
            is report.embedding_norms
            is report.network_share
            is report.distance_from_initialization
            is None
        )
        assert report.nearest.keys() == {"projected"} and "plain" in report.initialization_error
        assert str(report)


def test_a_damaged_folder_and_an_unknown_name_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="has no adapter_config"):
        inspect_prompt(tmp_path)
    with pytest.raises(ValueError, match="There is no adapter 'other'"):
        inspect_prompt(model, adapter_name="other")


# --- forms -----------------------------------------------------------------------------------------------------------


def test_json_holds_all_numbers(model, tokenizer):
    report = inspect_prompt(model, tokenizer, k=2)
    values = json.loads(report.to_json())
    assert values == json.loads(json.dumps(report.to_dict()))
    assert values["norms"] == pytest.approx(report.norms.tolist())
    assert values["similarity"][1][2] == pytest.approx(report.similarity[1, 2].item())
    assert values["nearest"]["embedding"]["euclidean"]["ids"] == report.nearest["embedding"]["euclidean"].ids.tolist()
    quantiles = values["vocabulary_norm_quantiles"]
    assert quantiles["0.0"] == pytest.approx(report.vocabulary_norms[0].item())
    assert quantiles["1.0"] == pytest.approx(report.vocabulary_norms[-1].item())


def test_the_table_has_a_row_per_token_and_its_columns_line_up(model, tokenizer):
    report = inspect_prompt(model, tokenizer, k=1)
    lines = str(report).split("\n\n")[1].splitlines()
    assert len(lines) == 5 and lines[0].split()[:3] == ["token", "norm", "norm"]
    for index, line in enumerate(lines[1:]):
        assert line.split()[:2] == [str(index), f"{report.norms[index]:.2f}"]
        assert report.nearest["embedding"]["cosine"].tokens[index][0] in line
    ends = {line.index(f"{norm:.2f}") + len(f"{norm:.2f}") for line, norm in zip(lines[1:], report.norms.tolist())}
    assert ends == {lines[0].index("norm") + len("norm")}


def test_a_single_token_has_no_other_to_be_close_to():
    report = inspect_prompt(get_peft_model(tiny_t5(), make_config(num_virtual_tokens=1)))
    assert "closest other " not in str(report).split("\n\n")[1]
