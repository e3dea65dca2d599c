"""`generate` with a prompt in front: every kind of decoding, and every way in which models prepare their inputs.

The oracle is the base model: a prompt of real words gives what the words in front of the text give.
"""

import copy
import inspect

import pytest
import torch
import transformers
from conftest import BASE, EOS, PAD, VOCAB_SIZE, WIDTH, make_config, sharpen, tiny, tiny_gpt2, tiny_llama, tiny_t5
from hosts import STOCK_GENERATION, TRANSFORMERS, needs_assistance, skip_where_transformers_fails
from peft import get_peft_model
from scenarios import SCENARIOS
from transformers import GenerationConfig
from transformers.generation import EncoderNoRepeatNGramLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor

from peft_residual import convert_to_prompt_tuning
from peft_residual.compat import assists_from_embeddings


WORDS = [9, 33, 21, 14]


def prompt_of_words(base, words=WORDS):
    """A model whose prompt is the given words."""
    base.generation_config.eos_token_id = None  # all rows are generated to the end
    base.generation_config.pad_token_id = PAD
    config = make_config(task_type="CAUSAL_LM", num_virtual_tokens=len(words), encoder_reparameterization_type="NONE")
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        prompt = base.get_input_embeddings()(torch.tensor(words)) / model.peft_config["default"].scale
        model.prompt_encoder["default"].embedding.weight.copy_(prompt)
    return model


def words_in_front(model, ids, **settings):
    """What the base model generates for the words and the text."""
    ids = torch.cat([torch.tensor(WORDS).expand(len(ids), -1), ids], dim=1)
    generated = model.base_model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    if isinstance(generated, torch.Tensor):
        return generated[:, len(WORDS) :]
    return generated.sequences[:, len(WORDS) :], generated.scores


# --- candidates -----------------------------------------------------------------------------------------------


def repeating(seed, length=12):
    """A text in which every pair of tokens comes again, so that lookup proposes something before the first step."""
    period = 3 + seed % 3
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (1, period), generator=generator).repeat(1, length)[:, :length]


PROPOSING = {
    "lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "assistant": lambda: {"assistant_model": tiny_llama()},
    "early exit": lambda: {"assistant_early_exit": 1},
    "in a config": lambda: {"generation_config": GenerationConfig(prompt_lookup_num_tokens=2, max_new_tokens=12)},
}


@needs_assistance
@pytest.mark.parametrize("proposing", PROPOSING)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, lambda: tiny("Qwen2"), lambda: tiny("Gemma2")])
def test_candidates_change_no_token(build, proposing):
    model = prompt_of_words(build())
    if proposing == "early exit" and not hasattr(model.base_model, "model"):
        pytest.skip("transformers does not shorten GPT-2")
    for seed in range(6):
        text = repeating(seed)
        settings = {} if proposing == "in a config" else {"max_new_tokens": 12}
        with torch.no_grad():
            expected = words_in_front(model, text, max_new_tokens=12)
        assert torch.equal(model.generate(text, **settings, **PROPOSING[proposing]()), expected)


@needs_assistance
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("proposing", ["lookup", "assistant"])
@pytest.mark.parametrize("mask", [[0, 0, 0] + [1] * 9, [1] * 4 + [0] + [1] * 7], ids=["padding", "gap"])
def test_candidates_change_no_token_of_a_masked_row(mask, proposing, cached):
    model, text = SCENARIOS["llama"].model(), repeating(1)
    model.base_model.generation_config.eos_token_id = None
    inputs = {"input_ids": text, "attention_mask": torch.tensor([mask]), "max_new_tokens": 12}
    expected = model.generate(**inputs)
    if cached:
        model.enable_prompt_cache()
    assert torch.equal(model.generate(**inputs, **PROPOSING[proposing]()), expected)


@pytest.mark.parametrize("guidance", [{}, {"negative_prompt_ids": torch.tensor([[40, 18, 52]])}], ids=["", "negative"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_guidance_leads_away_from_the_text_without_a_prompt(build, guidance):
    model, text = prompt_of_words(build()), repeating(2)
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = words_in_front(model, text, guidance_scale=3.0, **settings, **guidance)
    assert not torch.equal(expected, words_in_front(model, text, **settings))
    assert torch.equal(model.generate(text, guidance_scale=3.0, **settings, **guidance), expected)


def test_an_assistant_with_a_prompt_is_refused():
    model = SCENARIOS["llama"].model()
    with pytest.raises(ValueError, match=r"`assistant_model` has a prompt .* `assistant_model.get_base_model\(\)`"):
        model.generate(repeating(0), assistant_model=SCENARIOS["llama"].model())
    with pytest.raises(ValueError, match=r"`assistant_model` cannot be used .* encoder"):
        SCENARIOS["t5"].model().generate(repeating(0), assistant_model=tiny_t5())


def test_the_base_model_is_the_same_while_it_generates():
    model = prompt_of_words(tiny_llama())
    before = vars(model.base_model).copy()

    def compare(ids, scores):
        assert vars(model.base_model) == before
        return scores

    settings = {"logits_processor": [compare], "max_new_tokens": 3, "encoder_repetition_penalty": 1.5}
    if assists_from_embeddings():
        settings["prompt_lookup_num_tokens"] = 2
    model.generate(repeating(0), **settings)


# --- models that prepare their inputs in their own way --------------------------------------------------------

DECODER = {**BASE, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**DECODER, "num_key_value_heads": 1, "max_position_embeddings": 128}
MAMBA = {"mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_chunk_size": 4}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 8, **MAMBA}
ZAMBA = {"n_mamba_heads": 4, "mamba_d_state": 8, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_ngroups": 1}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
OLD = {"vocab_size": VOCAB_SIZE, "n_positions": 128, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
CHUNKED = {"attn_layers": ["local", "local"], "local_attn_chunk_length": 4, "axial_pos_shape": [8, 16]}
OWN_INPUTS = {
    "Bamba": {**GROUPED, **STATES, "attn_layer_indices": [1]},
    "CTRL": {**OLD, "dff": 32},
    "FalconH1": {**GROUPED, **STATES, "mamba_d_ssm": 32},
    "Gemma3": {
        "text_config": {**GROUPED, "head_dim": 8},
        "vision_config": VISION,
        "mm_tokens_per_image": 1,
        "image_token_index": 60,
        "boi_token_index": 61,
        "eoi_token_index": 62,
    },
    "OpenAIGPT": OLD,
    "PaliGemma": {
        "text_config": {**GROUPED, "head_dim": 8, "model_type": "gemma"},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "projection_dim": WIDTH,
        "hidden_size": WIDTH,
        "image_token_index": 60,
    },
    "Reformer": {**DECODER, **CHUNKED, "attention_head_size": 8, "axial_pos_embds_dim": [4, 12], "is_decoder": True},
    "RoCBert": {**DECODER, "is_decoder": True, "enable_shape": False, "enable_pronunciation": False},
    "XLM": {
        "vocab_size": VOCAB_SIZE,
        "emb_dim": WIDTH,
        "n_layers": 2,
        "n_heads": 2,
        "mask_token_id": 5,
        "pad_index": 0,
    },
    "XLNet": {"vocab_size": VOCAB_SIZE, "d_model": WIDTH, "n_layer": 2, "n_head": 2, "d_inner": 32, "mem_len": 64},
    "Zamba2": {
        **GROUPED,
        **ZAMBA,
        "attention_head_dim": 16,
        "layers_block_type": ["mamba", "hybrid"],
        "chunk_size": 4,
    },
}
HEADS = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel", "ModelWithLMHead", "WithLMHeadModel")
WITHOUT_MASK = ("Reformer", "XLM", "XLNet")
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


def model_with_own_inputs(name):
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, f"{name}Config")(**OWN_INPUTS[name])
    model_class = next(getattr(transformers, name + head) for head in HEADS if hasattr(transformers, name + head))
    return prompt_of_words(sharpen(model_class(config), 4.0))


def right_settings(name):
    """Settings with which the base model generates what whole forward passes give, and what a prompt must give."""
    has_wrong_cache = TRANSFORMERS < (4, 57) if name == "Gemma3" else name == "XLM" and TRANSFORMERS >= (5, 24)
    return {"use_cache": False} if has_wrong_cache else {}


def is_refused(model, **inputs):
    """Whether `generate` is refused by name: before 5.18, transformers gives some classes no embeddings."""
    takes_embeds = "inputs_embeds" in inspect.signature(model.base_model.prepare_inputs_for_generation).parameters
    if takes_embeds or assists_from_embeddings():
        return False
    with pytest.raises(ValueError, match="cannot generate with a prompt"):
        model.generate(**inputs)
    return True


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OWN_INPUTS)
def test_models_that_prepare_their_inputs_in_their_own_way(name, mode):
    if (name, mode) == ("PaliGemma", "no cache"):
        pytest.skip("without a cache, it reads what it has generated in both directions")
    model, settings = model_with_own_inputs(name), {"max_new_tokens": 5, **MODES[mode]}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    for length in (6, 1):
        text = torch.tensor([[7, 40, 18, 52, 31, 12]])[:, :length]
        if is_refused(model, input_ids=text, **settings):
            continue
        torch.manual_seed(3)
        with skip_where_transformers_fails():
            expected, expected_scores = words_in_front(model, text, **{**settings, **right_settings(name)})
        torch.manual_seed(3)
        generated = model.generate(text, **settings)
        assert torch.equal(generated.sequences, expected)
        for scores, others in zip(generated.scores, expected_scores, strict=True):
            torch.testing.assert_close(scores, others, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in OWN_INPUTS if name != "PaliGemma"])  # itself not right with padding
def test_padding_of_models_that_prepare_their_inputs_in_their_own_way(name):
    model = model_with_own_inputs(name)
    ids = torch.tensor([[7, 40, 18, 52, 31, 12], [0, 0, 8, 27, 11, 45]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 5}
    if is_refused(model, **inputs):
        return
    if name in WITHOUT_MASK:
        with pytest.raises(ValueError, match="one by one"):
            model.generate(**inputs)
        return
    settings = {"max_new_tokens": 5, **right_settings(name)}
    with skip_where_transformers_fails():
        expected = [words_in_front(model, row, **settings)[0] for row in (ids[:1], ids[1:, 2:])]
    generated = model.generate(**inputs)
    assert torch.equal(generated[0], expected[0]) and torch.equal(generated[1, 2:], expected[1])


def test_a_prompt_that_reads_the_text_is_computed_with_each_row():
    model = model_with_own_inputs("PaliGemma")
    ids = torch.tensor([[7, 40, 18, 52, 31, 12], [3, 41, 8, 27, 11, 45]])

    def run():
        logits = model(input_ids=ids).logits, model(input_ids=ids, logits_to_keep=2).logits
        return [*logits, model.generate(ids, max_new_tokens=5)]

    with torch.no_grad():
        expected = run()
        model.share_prompt(True)
        model.enable_prompt_cache()
        assert all(torch.equal(output, other) for output, other in zip(run(), expected))


@pytest.mark.parametrize("architecture", ["Musicgen"])
def test_a_model_without_a_table_of_words_is_refused_by_name(architecture):
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, {"Musicgen": "MusicgenDecoder"}.get(architecture, architecture) + "Config")
    base = getattr(transformers, f"{architecture}ForCausalLM")(config(**sizes))
    with pytest.raises(ValueError, match=f"{architecture}ForCausalLM has no table of word embeddings"):
        get_peft_model(base, make_config(task_type="CAUSAL_LM"))


# --- arguments of `generate` ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_arguments_by_position(name):
    model, ids = SCENARIOS[name].model(), repeating(0)
    config = GenerationConfig(max_new_tokens=4, min_new_tokens=4)
    expected = model.generate(input_ids=ids, generation_config=config)
    assert torch.equal(model.generate(ids, config), expected)
    with pytest.raises(TypeError, match="multiple values for argument 'generation_config'"):
        model.generate(ids, config, generation_config=config)


def test_without_input_generation_starts_as_in_transformers():
    model = prompt_of_words(tiny_llama())
    assert torch.equal(
        model.generate(max_new_tokens=5), words_in_front(model, torch.tensor([[EOS]]), max_new_tokens=5)
    )
    embeds = model.word_embeddings(repeating(0))
    with pytest.raises(ValueError, match="needs `input_ids`, got `inputs_embeds`"):
        model.generate(inputs_embeds=embeds)
    model.base_model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="no `bos_token_id`"):
        model.generate(max_new_tokens=5)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_a_prefill_in_chunks_is_done_in_one_piece_with_a_warning(size, cached):
    model, text = prompt_of_words(tiny_llama()), repeating(0)
    expected = model.generate(text, max_new_tokens=5)
    if cached:
        model.enable_prompt_cache()
    for config in ({"prefill_chunk_size": size}, {"generation_config": GenerationConfig(prefill_chunk_size=size)}):
        with pytest.warns(UserWarning, match="`prefill_chunk_size` has no effect"):
            assert torch.equal(model.generate(text, max_new_tokens=5, **config), expected)


PENALTIES = {
    "encoder_repetition_penalty": (5.0, EncoderRepetitionPenaltyLogitsProcessor),
    "encoder_no_repeat_ngram_size": (1, EncoderNoRepeatNGramLogitsProcessor),
}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", ["t5", "llama", "gpt2"])
def test_penalties_on_tokens_of_the_input(name, penalty):
    model = SCENARIOS[name].model()
    model.base_model.generation_config.eos_token_id = None
    value, processor = PENALTIES[penalty]
    liked = [model.generate(repeating(seed), max_new_tokens=8)[:, -5:] for seed in range(5)]
    for text in [*liked, *(repeating(seed) for seed in range(5))]:
        expected = model.generate(text, max_new_tokens=8, logits_processor=[processor(value, text)])
        if not torch.equal(expected, model.generate(text, max_new_tokens=8)):
            break
    else:
        pytest.fail("the penalty changes no token of any text")
    for settings in ({penalty: value}, {"generation_config": GenerationConfig(**{penalty: value})}):
        assert torch.equal(model.generate(text, max_new_tokens=8, **settings), expected)
    if name != "t5":  # there PEFT itself ignores the penalties
        stock = copy.deepcopy(model)
        convert_to_prompt_tuning(stock)
        assert torch.equal(
            stock.generate(input_ids=text, max_new_tokens=8, **{penalty: value}, **STOCK_GENERATION), expected
        )
