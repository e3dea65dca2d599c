"""Every field of the config: its default, which values raise, which are unused, saving and loading."""

import copy
import json
import pickle
import re
import warnings
from dataclasses import fields

import peft
import pytest
from conftest import WIDTH, make_config, tiny_t5
from hypothesis import given
from hypothesis import strategies as st
from peft import AutoPeftModel, PeftConfig, PeftType, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

from peft_residual import ResidualPromptEncoder, ResidualPromptTuningConfig


NAME = "RESIDUAL_PROMPT_TUNING"
SIZES = (
    "num_virtual_tokens",
    "encoder_hidden_size",
    "encoder_num_attention_heads",
    "prompt_tuning_init_vocab_size",
    "token_dim",
)
NO_INT = st.one_of(st.integers(max_value=0), st.floats(), st.sampled_from([True, False, "4", [4]]))


def refusal(**values):
    """The message with which a config of these values is refused."""
    with pytest.raises(ValueError) as error:
        make_config(**values)
    return str(error.value)


def warns_and_saves(message, **values):
    """Check that a config of these values warns, once, where it is written; and not when it is loaded again."""
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        config = make_config(**values)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ResidualPromptTuningConfig(**config.to_dict()) == config


# --- defaults ---------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    config = ResidualPromptTuningConfig(task_type="SEQ_2_SEQ_LM")
    expected = {
        "num_virtual_tokens": 10,
        "num_transformer_submodules": 1,
        "encoder_reparameterization_type": "MLP1",
        "encoder_hidden_size": 800,
        "encoder_shared": True,
        "encoder_residual": True,
        "encoder_layer_norm": True,
        "encoder_norm_first": False,
        "encoder_zero_init": False,
        "encoder_activation": "relu",
        "encoder_dropout": 0.0,
        "prompt_tuning_init": "COMMON_VOCAB",
        "prompt_tuning_init_vocab_size": 5000,
        "prompt_tuning_init_seed": None,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_every_field_of_ours_has_a_help_text():
    own = [f for f in fields(ResidualPromptTuningConfig) if f.name in ResidualPromptTuningConfig.__annotations__]
    assert len(own) >= 15
    assert [f.name for f in own if len(f.metadata.get("help", "")) < 10] == []


def test_every_field_of_ours_is_described_in_the_docstring():
    inherited = {f.name for f in fields(PromptTuningConfig)}
    own = [f.name for f in fields(ResidualPromptTuningConfig) if f.name not in inherited]
    assert own and [name for name in own if f"        {name} (" not in ResidualPromptTuningConfig.__doc__] == []


def test_the_decoder_gets_rows_only_when_asked():
    assert make_config().total_virtual_tokens == 4
    assert make_config(num_transformer_submodules=2).total_virtual_tokens == 8


@pytest.mark.parametrize("task", list(TaskType))
def test_every_task_of_peft_is_accepted(task):
    assert make_config(task_type=task.value).task_type == task


def test_it_is_a_prompt_tuning_config_to_peft():
    config = make_config()
    assert isinstance(config, PromptTuningConfig) and config.is_prompt_learning
    assert config.peft_type == NAME and config.peft_type.value == NAME


# --- refusals: the field, the value, the remedy -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"task_type": "SEQ2SEQ"}, ("Invalid task type", "'SEQ2SEQ'", "SEQ_2_SEQ_LM")),  # PEFT's words
        ({"peft_type": "LORA"}, ("`peft_type`", "'LORA'", "Leave it out")),
        ({"num_transformer_submodules": 3}, ("`num_transformer_submodules`", "3", "Leave it out")),
        ({"num_transformer_submodules": 0}, ("`num_transformer_submodules`", "0", "Leave it out")),
        ({"num_transformer_submodules": 1.0}, ("`num_transformer_submodules`", "1.0", "Leave it out")),
        ({"num_transformer_submodules": True}, ("`num_transformer_submodules`", "True", "Leave it out")),
        (
            {"encoder_reparameterization_type": "MLP3"},
            ("encoder_reparameterization_type='MLP3'", "'MLP1'", "'NONE'", "register_reparameterization"),
        ),
        ({"encoder_reparameterization_type": None}, ("encoder_reparameterization_type=None", "'MLP1'")),
        ({"encoder_reparameterization_type": ["MLP1"]}, ("encoder_reparameterization_type=['MLP1']", "'MLP1'")),
        ({"encoder_activation": "rellu"}, ("encoder_activation='rellu'", "'relu'")),
        ({"encoder_activation": None}, ("encoder_activation=None", "'relu'")),
        ({"encoder_activation": ["relu"]}, ("encoder_activation=['relu']", "'relu'")),
        ({"encoder_dropout": 1.0}, ("`encoder_dropout`", "1.0", "[0, 1)")),
        ({"encoder_dropout": -0.1}, ("`encoder_dropout`", "-0.1", "[0, 1)")),
        ({"encoder_dropout": float("nan")}, ("`encoder_dropout`", "nan", "[0, 1)")),
        ({"encoder_dropout": "0.1"}, ("`encoder_dropout`", "'0.1'", "[0, 1)")),
        ({"encoder_dropout": False}, ("`encoder_dropout`", "False", "[0, 1)")),
        ({"encoder_dropout": None}, ("`encoder_dropout`", "None", "[0, 1)")),
        ({"encoder_shared": 1}, ("`encoder_shared`", "1", "bool")),
        ({"encoder_residual": "yes"}, ("`encoder_residual`", "'yes'", "bool")),
        ({"encoder_norm_first": 1}, ("`encoder_norm_first`", "1", "bool")),
        ({"encoder_zero_init": "yes"}, ("`encoder_zero_init`", "'yes'", "bool")),
        ({"encoder_layer_norm": None}, ("`encoder_layer_norm`", "None", "bool")),
        (
            {"encoder_activation": "prelu", "encoder_shared": False},
            ("`encoder_shared=False`", "encoder_activation='prelu'", "'relu'"),
        ),
        (
            {"prompt_tuning_init": "VOCAB"},
            ("prompt_tuning_init='VOCAB'", "'COMMON_VOCAB'", "register_initialization"),
        ),
        ({"prompt_tuning_init": None}, ("prompt_tuning_init=", "None", "'COMMON_VOCAB'")),
        ({"prompt_tuning_init_seed": -1}, ("`prompt_tuning_init_seed`", "-1", "at least 0")),
        ({"prompt_tuning_init_seed": 2**64}, ("`prompt_tuning_init_seed`", str(2**64))),
        ({"prompt_tuning_init_seed": 1.5}, ("`prompt_tuning_init_seed`", "1.5", "integer")),
        ({"prompt_tuning_init_seed": True}, ("`prompt_tuning_init_seed`", "True", "integer")),
        (
            {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "t"},
            ("prompt_tuning_init='TEXT'", "`prompt_tuning_init_text`", "None", "Set it"),
        ),
        (
            {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "t", "prompt_tuning_init_text": ""},
            ("prompt_tuning_init='TEXT'", "`prompt_tuning_init_text`", "''", "Set it"),
        ),
        (
            {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "good"},
            ("prompt_tuning_init='TEXT'", "`tokenizer_name_or_path`", "None", "Name the base model's tokenizer"),
        ),
        (
            {"prompt_tuning_init": "CLASS_LABELS", "tokenizer_name_or_path": "t"},
            ("prompt_tuning_init='CLASS_LABELS'", "`prompt_tuning_init_class_labels`", "None", "Set it"),
        ),
        (
            {"prompt_tuning_init": "CLASS_LABELS", "prompt_tuning_init_class_labels": ["good"]},
            ("prompt_tuning_init='CLASS_LABELS'", "`tokenizer_name_or_path`", "None"),
        ),
        (
            {"prompt_tuning_init": "PROMPT"},
            ("prompt_tuning_init='PROMPT'", "`prompt_tuning_init_state_dict_path`", "None", "Set it"),
        ),
        (
            {"prompt_tuning_init_token_ids": [3, -1]},
            ("`prompt_tuning_init_token_ids`", "-1", "most_common_token_ids"),
        ),
        (
            {"prompt_tuning_init_token_ids": [3, 4.0]},
            ("`prompt_tuning_init_token_ids`", "4.0", "most_common_token_ids"),
        ),
        ({"prompt_tuning_init_token_ids": []}, ("`prompt_tuning_init_token_ids`", "[]", "most_common_token_ids")),
        ({"prompt_tuning_init_token_ids": "34"}, ("`prompt_tuning_init_token_ids`", "'34'", "most_common_token_ids")),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_bad_value_is_refused_with_field_value_and_remedy(values, words):
    message = refusal(**values)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("kind", ("LSTM1", "LSTM2", "LSTM", "TRANSFORMER"))
def test_one_network_per_token_is_refused_where_tokens_must_mix(kind):
    message = refusal(encoder_reparameterization_type=kind, encoder_shared=False)
    assert all(word in message for word in ("`encoder_shared=False`", repr(kind), "'MLP1' or 'MLP2'"))


@pytest.mark.parametrize("labels", ("good", ["good", ""], ["good", 3], {"good": 1}))
def test_class_labels_that_are_no_list_of_words_are_refused(labels):
    message = refusal(
        prompt_tuning_init="CLASS_LABELS", tokenizer_name_or_path="t", prompt_tuning_init_class_labels=labels
    )
    assert "`prompt_tuning_init_class_labels`" in message and repr(labels) in message


def test_more_labels_than_virtual_tokens_are_refused():
    labels = ["good", "bad", "poor", "great", "fast"]
    message = refusal(
        prompt_tuning_init="CLASS_LABELS", tokenizer_name_or_path="t", prompt_tuning_init_class_labels=labels
    )
    words = ("`prompt_tuning_init_class_labels`", "5 labels", "num_virtual_tokens=4", "more tokens")
    assert [word for word in words if word not in message] == []


# --- fields that another setting makes unused --------------------------------------------------------------------


@pytest.mark.parametrize("init", ("COMMON_VOCAB", "SAMPLE_VOCAB", "RANDOM"))
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_tuning_init_text", "good film"),
        ("prompt_tuning_init_class_labels", ["good"]),
        ("prompt_tuning_init_state_dict_path", "some/folder"),
    ],
)
def test_a_field_of_another_initialization_warns(init, name, value):
    warns_and_saves(
        f"`{name}` has no effect with prompt_tuning_init={init!r}", prompt_tuning_init=init, **{name: value}
    )


@pytest.mark.parametrize("init", ("SAMPLE_VOCAB", "RANDOM"))
def test_common_token_ids_warn_if_none_are_sampled(init):
    warns_and_saves(
        f"`prompt_tuning_init_token_ids` has no effect with prompt_tuning_init={init!r}",
        prompt_tuning_init=init,
        prompt_tuning_init_token_ids=[3, 4, 5, 6],
    )


def test_tokenizer_kwargs_without_a_tokenizer_warn():
    message = "`tokenizer_kwargs`={'use_fast': True} has no effect without `tokenizer_name_or_path`"
    warns_and_saves(message, tokenizer_kwargs={"use_fast": True})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((kind, "encoder_hidden_size", 9) for kind in ("LSTM1", "LSTM2", "NONE")),
        *((kind, "encoder_activation", "tanh") for kind in ("LSTM1", "LSTM2", "SUPERPOS", "NONE")),
        *((kind, "encoder_num_attention_heads", 4) for kind in ("MLP1", "MLP2", "LSTM1", "LSTM2", "LSTM")),
        *((kind, "encoder_num_attention_heads", 4) for kind in ("SUPERPOS", "NONE")),
        *((kind, "encoder_shared", False) for kind in ("SUPERPOS", "NONE")),
        *((kind, "encoder_residual", False) for kind in ("SUPERPOS", "NONE")),
        *((kind, "encoder_layer_norm", False) for kind in ("SUPERPOS", "NONE")),
        *((kind, "encoder_dropout", 0.1) for kind in ("SUPERPOS", "NONE")),
        *(
            (kind, name, True)
            for kind in ("LSTM1", "LSTM2", "LSTM", "TRANSFORMER", "SUPERPOS", "NONE")
            for name in ("encoder_norm_first", "encoder_zero_init")
        ),
    ],
)
def test_a_field_that_the_network_does_not_read_warns(kind, name, value):
    message = f"`{name}`={value!r} has no effect with encoder_reparameterization_type={kind!r}"
    warns_and_saves(message, encoder_reparameterization_type=kind, **{name: value})


def test_a_norm_that_comes_first_warns_without_a_norm():
    message = "`encoder_norm_first=True` has no effect with encoder_layer_norm=False"
    warns_and_saves(message, encoder_norm_first=True, encoder_layer_norm=False)


def test_a_network_that_starts_at_zero_needs_the_skip():
    message = refusal(encoder_zero_init=True, encoder_residual=False)
    assert "`encoder_zero_init=True`" in message and "encoder_residual=False" in message and "out" in message


def test_a_sweep_over_networks_with_one_hidden_size_gets_through():
    for kind in ("MLP1", "LSTM", "TRANSFORMER", "SUPERPOS"):
        make_config(encoder_reparameterization_type=kind, encoder_hidden_size=9)
    for kind in ("LSTM1", "LSTM2", "NONE"):
        with pytest.warns(UserWarning, match="`encoder_hidden_size`=9 has no effect"):
            make_config(encoder_reparameterization_type=kind, encoder_hidden_size=9)


@pytest.mark.parametrize("kind", ("LSTM1", "LSTM2", "LSTM"))
def test_an_odd_width_is_refused_for_an_lstm(kind):
    message = refusal(encoder_reparameterization_type=kind, token_dim=15)
    assert all(word in message for word in (repr(kind), "`token_dim`", "15", "'MLP1'"))


@pytest.mark.parametrize("heads", (3, 5, 32))
def test_heads_that_do_not_divide_the_width_are_refused(heads):
    options = {"encoder_reparameterization_type": "TRANSFORMER", "encoder_num_attention_heads": heads}
    message = refusal(token_dim=WIDTH, **options)
    words = ("`encoder_num_attention_heads`", str(heads), "`token_dim`=16", "[1, 2, 4, 8, 16]")
    assert [word for word in words if word not in message] == []
    assert make_config(**options).encoder_num_attention_heads == heads  # the width is not known yet


# --- ranges -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
@given(value=NO_INT)
def test_a_size_that_is_no_positive_integer_is_refused(name, value):
    kind = "TRANSFORMER" if name == "encoder_num_attention_heads" else "MLP1"
    message = refusal(encoder_reparameterization_type=kind, **{name: value})
    assert f"`{name}`" in message and repr(value) in message


@pytest.mark.parametrize("name", SIZES)
@given(value=st.integers(1, 10**6))
def test_a_size_that_is_a_positive_integer_is_kept(name, value):
    kind = "TRANSFORMER" if name == "encoder_num_attention_heads" else "MLP1"
    assert getattr(make_config(encoder_reparameterization_type=kind, **{name: value}), name) == value


@given(value=st.floats(0, 1, exclude_max=True))
def test_a_dropout_from_zero_to_below_one_is_kept(value):
    assert make_config(encoder_dropout=value).encoder_dropout == value


@given(value=st.floats().filter(lambda x: not 0 <= x < 1))
def test_any_other_dropout_is_refused(value):
    message = refusal(encoder_dropout=value)
    assert "`encoder_dropout`" in message and repr(value) in message


@given(width=st.integers(1, 10**4), heads=st.integers(1, 64))
def test_a_transformer_takes_exactly_the_head_counts_that_divide_the_width(width, heads):
    options = {"encoder_reparameterization_type": "TRANSFORMER", "encoder_num_attention_heads": heads}
    if width % heads == 0:
        assert make_config(token_dim=width, **options).token_dim == width
    else:
        assert "`encoder_num_attention_heads`" in refusal(token_dim=width, **options)


@given(seed=st.integers(0, 2**63 - 1))
def test_a_seed_of_at_least_zero_is_kept(seed):
    assert make_config(prompt_tuning_init_seed=seed).prompt_tuning_init_seed == seed


# --- to disk and back -------------------------------------------------------------------------------------------


FULL = {
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 7,
    "encoder_reparameterization_type": "MLP2",
    "encoder_hidden_size": 12,
    "encoder_shared": False,
    "encoder_residual": False,
    "encoder_layer_norm": False,
    "encoder_activation": "tanh",
    "encoder_dropout": 0.25,
    "prompt_tuning_init": "CLASS_LABELS",
    "prompt_tuning_init_class_labels": ["good", "bad"],
    "prompt_tuning_init_token_ids": [9, 8, 7, 6, 5],
    "prompt_tuning_init_seed": 3,
    "prompt_tuning_init_vocab_size": 11,
    "tokenizer_name_or_path": "some/tokenizer",
    "tokenizer_kwargs": {"use_fast": True},
    "base_model_name_or_path": "some/model",
    "token_dim": 16,
}


@pytest.mark.parametrize("load", (PeftConfig.from_pretrained, ResidualPromptTuningConfig.from_pretrained))
@pytest.mark.parametrize("values", ({}, FULL), ids=("small", "every field"))
def test_a_saved_config_comes_back_the_same(values, load, tmp_path):
    config = make_config(**values)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == NAME
    loaded = load(str(tmp_path))
    assert type(loaded) is ResidualPromptTuningConfig
    assert loaded == config and loaded.peft_type == NAME


def test_the_dictionary_names_the_type_and_makes_the_config_again():
    config = make_config(**FULL)
    values = config.to_dict()
    assert values["peft_type"] == NAME
    assert json.loads(json.dumps(values)) == {**values, "prompt_tuning_init_class_labels": ["good", "bad"]}
    assert peft.get_peft_config(values) == config
    assert ResidualPromptTuningConfig(**values) == config


def test_the_former_name_of_the_vocabulary_size_is_read(tmp_path):
    assert make_config(init_vocab_size=7) == make_config(prompt_tuning_init_vocab_size=7)
    values = make_config().to_dict()
    del values["prompt_tuning_init_vocab_size"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "init_vocab_size": 9}))
    assert PeftConfig.from_pretrained(str(tmp_path)).prompt_tuning_init_vocab_size == 9
    assert "`prompt_tuning_init_vocab_size`" in refusal(init_vocab_size=0)


def test_a_config_without_a_task_cannot_build_a_model():
    config = make_config(task_type=None)
    with pytest.raises(ValueError, match=r"`task_type` must be one of .*SEQ_2_SEQ_LM.*, got None"):
        get_peft_model(tiny_t5(), config)


def test_peft_refuses_an_auto_mapping_to_imports_that_are_not_allowed(tmp_path):
    values = {"base_model_class": "system", "parent_library": "os"}
    config = make_config(task_type=None, auto_mapping=values, base_model_name_or_path="some/model")
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(str(tmp_path)) == config
    with pytest.raises(ValueError, match="wants to import 'os' which is not in the import allowlist"):
        AutoPeftModel.from_pretrained(str(tmp_path))


def test_remote_code_of_a_tokenizer_is_the_users_decision_and_is_not_saved(tmp_path):
    options = {"tokenizer_name_or_path": "t", "tokenizer_kwargs": {"trust_remote_code": True, "use_fast": True}}
    config = make_config(**options)
    assert config.tokenizer_kwargs["trust_remote_code"] is True
    config.save_pretrained(tmp_path)
    assert config.tokenizer_kwargs["trust_remote_code"] is True
    assert PeftConfig.from_pretrained(str(tmp_path)).tokenizer_kwargs == {"use_fast": True}
    values = {**config.to_dict(), **options}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"`tokenizer_kwargs`.*'trust_remote_code': True.*must not"):
        PeftConfig.from_pretrained(str(tmp_path))


def test_peft_finds_the_config_by_its_name():
    config = peft.get_peft_config({"peft_type": NAME, "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 3})
    assert type(config) is ResidualPromptTuningConfig and config.num_virtual_tokens == 3
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[NAME] is ResidualPromptTuningConfig
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[NAME] is ResidualPromptEncoder


@pytest.mark.parametrize("init", (PromptTuningInit.RANDOM, "RANDOM"))
def test_a_start_may_be_named_by_pefts_enum(init):
    config = make_config(prompt_tuning_init=init)
    assert json.loads(json.dumps(config.to_dict()))["prompt_tuning_init"] == "RANDOM"
    assert config == make_config(prompt_tuning_init="RANDOM")


@pytest.mark.parametrize("clone", (copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))))
def test_a_copied_config_is_equal(clone):
    config = make_config(**FULL)
    assert clone(config) == config


def test_a_config_of_a_later_version_loads_with_a_warning(tmp_path):
    values = {**make_config().to_dict(), "encoder_of_the_future": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="encoder_of_the_future"):
        assert PeftConfig.from_pretrained(str(tmp_path)) == make_config()


def test_plain_prompt_tuning_configs_stay_as_they_are(tmp_path):
    plain = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    assert plain.to_dict()["peft_type"] == PeftType.PROMPT_TUNING
    plain.save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is PromptTuningConfig
