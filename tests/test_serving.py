"""Requests to vLLM and SGLang, decoded as `peft_residual/export/serving.py` says that those engines do."""

import base64
import io
import json

import pytest
import torch
from conftest import make_config, tiny, tiny_t5
from peft import get_peft_model
from scenarios import SCENARIOS, outputs_of

from peft_residual.export import embed_with_prompt, sglang_request, vllm_request


LLAMA = SCENARIOS["llama"]
TEXTS = ["good food", "the bad film was slow"]


def decoded_by_vllm(text):
    """Strict base64, a tensor without code, two dimensions of floating-point numbers."""
    tensor = torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True)
    assert tensor.ndim == 2 and tensor.is_floating_point()
    return tensor


def decoded_by_sglang(rows):
    """The first number must be a float, by which a single text is told from several."""
    assert isinstance(rows[0][0], float)
    return torch.tensor(rows)


def logits_of(model, embeddings):
    with torch.no_grad():
        return model.base_model(inputs_embeds=embeddings.unsqueeze(0)).logits


@pytest.mark.parametrize(
    ("build", "field", "decode"),
    [(vllm_request, "prompt_embeds", decoded_by_vllm), (sglang_request, "input_embeds", decoded_by_sglang)],
)
def test_what_an_engine_decodes_gives_the_live_models_logits(build, field, decode, tokenizer):
    model = LLAMA.model()
    request = json.loads(json.dumps(build(model, tokenizer, TEXTS[0], model="served", max_tokens=3)))
    assert request.keys() == {"model", "max_tokens", field} and request["model"] == "served"
    live = outputs_of(model, tokenizer(TEXTS[0], return_tensors="pt"))
    assert torch.equal(logits_of(model, decode(request[field])), live)

    request = json.loads(json.dumps(build(model, tokenizer, TEXTS)))
    assert len(request[field]) == 2
    for text, encoded in zip(TEXTS, request[field]):
        assert torch.equal(decode(encoded), embed_with_prompt(model, tokenizer, text))


def test_embeddings_are_prompt_and_text_in_the_models_type(tokenizer):
    model = LLAMA.model(base=LLAMA.build().to(torch.bfloat16))
    embeddings = embed_with_prompt(model, tokenizer, TEXTS[1])
    assert embeddings.shape == (4 + 5, 16) and embeddings.dtype == torch.bfloat16 and not embeddings.requires_grad
    request = vllm_request(model, tokenizer, TEXTS[1])
    assert torch.equal(decoded_by_vllm(request["prompt_embeds"]), embeddings)
    assert len(base64.b64decode(request["prompt_embeds"])) < 9 * 16 * 2 + 2048, "no more storage than numbers"


def test_scaled_embeddings_are_what_the_layers_see(tokenizer):
    model = LLAMA.model(base=tiny("Gemma3Text", head_dim=8))
    live = outputs_of(model, tokenizer(TEXTS[0], return_tensors="pt"))
    assert torch.equal(logits_of(model, embed_with_prompt(model, tokenizer, TEXTS[0])), live)
    sglang_request(model, tokenizer, TEXTS[0])
    with pytest.raises(ValueError, match=r"SGLang multiplies.*'gemma2'.*save_as_vocabulary"):
        sglang_request(LLAMA.model(base=tiny("Gemma2", head_dim=8)), tokenizer, TEXTS[0])


def test_other_tasks_and_adapters_are_refused(tokenizer):
    for build in (vllm_request, sglang_request):
        with pytest.raises(ValueError, match=r"task_type='SEQ_2_SEQ_LM'.*save_as_vocabulary"):
            build(get_peft_model(tiny_t5(), make_config()), tokenizer, "a")
        with pytest.raises(ValueError, match="There is no adapter 'x'"):
            build(LLAMA.model(), tokenizer, "a", adapter_name="x")
        with pytest.raises(ValueError, match="must be a PeftModel"):
            build(LLAMA.build(), tokenizer, "a")
