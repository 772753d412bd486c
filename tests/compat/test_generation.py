"""Generation and evaluation with saved students, in tools that load them by their folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch
from transformers import AutoModelForCausalLM, TextIteratorStreamer, pipeline

MIXINGS = pytest.mark.parametrize("mixing", ["add", "interleave"])
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def greedy(model, ids: torch.Tensor, **settings: object) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **settings)


@pytest.mark.compat("transformers", "pipeline('text-generation')")
@MIXINGS
def test_pipeline(mixing, folder, tokenizer) -> None:
    path = folder(mixing=mixing)
    texts = pipeline("text-generation", model=str(path))("w5 w6 w7", **GREEDY)
    model = AutoModelForCausalLM.from_pretrained(path)
    expected = greedy(model, tokenizer("w5 w6 w7", return_tensors="pt").input_ids)
    text = tokenizer.decode(expected[0], skip_special_tokens=True)
    assert texts[0]["generated_text"].replace(" ", "") == text.replace(" ", "")


@pytest.mark.compat("transformers", "generate: static cache")
@MIXINGS
def test_static_cache(mixing, student, ids) -> None:
    model = student(mixing=mixing)
    assert torch.equal(greedy(model, ids, cache_implementation="static"), greedy(model, ids))


@pytest.mark.compat("transformers", "generate: quantized cache (fp8)")
@MIXINGS
def test_quantized_cache(mixing, student, ids) -> None:
    found = greedy(student(mixing=mixing), ids, cache_implementation="quantized", cache_config={"backend": "fp8"})
    assert found.shape == (1, 18)


@pytest.mark.compat("transformers", "generate: assisted decoding, prompt lookup")
@MIXINGS
def test_assisted_decoding(mixing, student, ids) -> None:
    model, assistant = student(mixing=mixing), student(mixing="none")
    text = greedy(model, ids, suppress_tokens=[0])
    assert torch.equal(greedy(model, ids, suppress_tokens=[0], assistant_model=assistant), text)
    assert torch.equal(greedy(model, ids, suppress_tokens=[0], prompt_lookup_num_tokens=3), text)


@pytest.mark.compat("transformers", "generate: streamer")
@MIXINGS
def test_streamer(mixing, student, ids, tokenizer) -> None:
    model, streamer = student(mixing=mixing), TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = Thread(target=greedy, args=(model, ids), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == tokenizer.decode(greedy(model, ids)[0, ids.shape[1] :]).split()


@pytest.mark.compat("transformers", "generate: paged cache, as continuous batching needs", refused=True)
@MIXINGS
def test_paged_cache(mixing, student, ids) -> None:
    with pytest.raises(ValueError, match="takes no paged cache, as continuous batching needs"):
        greedy(student(mixing=mixing), ids, cache_implementation="paged")


@pytest.mark.compat("lm_eval", "lm_eval --model hf")
@MIXINGS
def test_lm_eval(mixing, folder, tmp_path: Path) -> None:
    path = folder(mixing=mixing)
    (tmp_path / "data.json").write_text(
        json.dumps([{"text": "w1 w2 w3", "end": " w4"}, {"text": "w4 w5", "end": " w6"}])
    )
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.json")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{end}}",
        "metric_list": [{"metric": "perplexity"}],
    }
    (tmp_path / "words.yaml").write_text(json.dumps(task))  # JSON is YAML
    settings = f"pretrained={path},trust_remote_code=True,dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", settings, "--tasks", "words"]
    more = [
        "--include_path",
        str(tmp_path),
        "--device",
        "cpu",
        "--batch_size",
        "2",
        "--output_path",
        str(tmp_path / "out"),
    ]
    subprocess.run([*command, *more], check=True, capture_output=True, timeout=300)
    (result,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(result.read_text())["results"]["words"]["perplexity,none"]
    model, total = AutoModelForCausalLM.from_pretrained(path), 0.0
    for text in ([1, 2, 3, 4], [4, 5, 6]):
        logits = model(torch.tensor([text[:-1]])).logits[0, -1]
        total += logits.log_softmax(-1)[text[-1]].item()
    assert found == pytest.approx(torch.tensor(-total / 2).exp().item(), rel=1e-4)
