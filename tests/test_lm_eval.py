"""EleutherAI's evaluation harness scores a model with a residual adapter as a loop by hand does."""

import json

import pytest
import torch
from conftest import make_config, sharpen, tiny_llama, tiny_t5
from peft import get_peft_model


lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval (pip install lm-eval)")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402


ROWS = [
    {"text": "this film is", "choices": [" good", " bad very slow"], "label": 0},
    {"text": "the song was slow and it is", "choices": [" great", " poor"], "label": 1},
    {"text": "a red cat", "choices": [" yes", " no maybe"], "label": 1},
    {"text": "one two three", "choices": [" four", " five six"], "label": 0},
    {"text": "place", "choices": [" up", " down"], "label": 0},
]


def prompted(base, task_type):
    model = get_peft_model(base, make_config(task_type=task_type, num_virtual_tokens=5))
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


def log_likelihood(model, tokenizer, text, continuation):
    """Of one continuation, and whether greedy decoding gives it, from one row without padding."""
    ids = tokenizer(text + continuation, add_special_tokens=False, return_tensors="pt").input_ids
    length = len(tokenizer(text, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -ids.shape[1] :]
    scores = logits[length - 1 : -1].log_softmax(-1)
    target = ids[0, length:]
    return scores.gather(1, target[:, None]).sum().item(), bool((scores.argmax(-1) == target).all())


@pytest.fixture
def harness(tokenizer):
    def build(model, **settings):
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, **settings)

    return build


@pytest.fixture
def model():
    return prompted(sharpen(tiny_llama(), 4.0), "CAUSAL_LM")


def test_log_likelihoods_of_batches(harness, model, tokenizer):
    pairs = [(row["text"], choice) for row in ROWS for choice in row["choices"]]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = harness(model).loglikelihood(requests)
    for pair, (score, is_greedy) in zip(pairs, found, strict=True):
        expected, expected_greedy = log_likelihood(model, tokenizer, *pair)
        assert score == pytest.approx(expected, rel=1e-5) and is_greedy == expected_greedy
    with model.disable_adapter():
        without = [log_likelihood(model, tokenizer, *pair)[0] for pair in pairs]
    assert all(abs(score - other) > 1e-3 for (score, _), other in zip(found, without, strict=True))


def test_generated_text(harness, model, tokenizer):
    requests = [
        Instance("generate_until", {}, (row["text"], {"until": ["\n"], "max_gen_toks": 6}), i)
        for i, row in enumerate(ROWS)
    ]
    found = harness(model).generate_until(requests)
    for row, text in zip(ROWS, found, strict=True):
        ids = tokenizer(row["text"], return_tensors="pt", add_special_tokens=False).input_ids
        tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_task_of_ones_own(harness, model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = ConfigurableTask(
        config={
            "task": "own",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / "test.jsonl")},
                "cache_dir": str(tmp_path / "cache"),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "text",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
    )
    results = lm_eval.simple_evaluate(harness(model), tasks=[task], bootstrap_iters=0, log_samples=False)
    correct = 0
    for row in ROWS:
        scores = [log_likelihood(model, tokenizer, row["text"], choice)[0] for choice in row["choices"]]
        correct += scores.index(max(scores)) == row["label"]
    assert results["results"]["own"]["acc,none"] == pytest.approx(correct / len(ROWS))


def test_an_encoder_decoder_model(harness, tokenizer):
    model = prompted(sharpen(tiny_t5(), 4.0), "SEQ_2_SEQ_LM")
    requests = [Instance("loglikelihood", {}, (row["text"], row["choices"][0]), i) for i, row in enumerate(ROWS)]
    found = harness(model, backend="seq2seq").loglikelihood(requests)
    for row, (score, _) in zip(ROWS, found, strict=True):
        ids = tokenizer(row["text"], return_tensors="pt").input_ids
        labels = tokenizer(row["choices"][0], return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            scores = model(input_ids=ids, labels=labels).logits[0].log_softmax(-1)
        assert score == pytest.approx(scores.gather(1, labels[0][:, None]).sum().item(), rel=1e-5)
