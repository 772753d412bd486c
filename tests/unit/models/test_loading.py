"""Models are loaded complete, or refused with an error that names the folder and the weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from cocomix.common.errors import InputError, UnreachableError
from cocomix.models.loading import check_vocabulary, load_causal_lm, load_config

WEIGHTS = "model.safetensors"


@pytest.fixture
def config() -> GPT2Config:
    return GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=1, pad_token_id=0)


@pytest.fixture
def folder(config: GPT2Config, tmp_path: Path) -> Path:
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, **changed: torch.Tensor | None) -> None:
    """Replace weights by name, with `__` for a dot; None removes one."""
    weights = load_file(folder / WEIGHTS)
    changes = {name.replace("__", "."): value for name, value in changed.items()}
    kept = {name: value for name, value in {**weights, **changes}.items() if value is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_whole_model_loads_with_its_tied_head_and_in_its_own_dtype(folder: Path) -> None:
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    model = load_causal_lm(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert load_causal_lm(folder, torch.bfloat16).dtype == torch.bfloat16 != model.dtype


def test_masks_that_older_versions_saved_are_no_weights(folder: Path) -> None:
    mask = torch.ones(8, 8).tril().view(1, 1, 8, 8)
    rewrite(folder, transformer__h__0__attn__bias=mask, transformer__h__0__attn__masked_bias=torch.tensor(-1e4))
    load_causal_lm(folder)


def test_a_model_is_refused_unless_its_files_hold_exactly_its_weights(folder: Path, config: GPT2Config) -> None:
    rewrite(folder, transformer__h__1__mlp__c_fc__weight=None, transformer__ln_f__bias=None)
    with pytest.raises(InputError, match=r"model is not used: its files lack weights .*h\.1\.mlp.* and 1 more"):
        load_causal_lm(folder)

    GPT2LMHeadModel(config).save_pretrained(folder)
    rewrite(folder, transformer__h__2__mlp__c_fc__bias=torch.zeros(32))
    with pytest.raises(InputError, match=r"weights that it does not know .*h\.2\.mlp"):
        load_causal_lm(folder)

    GPT2LMHeadModel(config).save_pretrained(folder)
    rewrite(folder, transformer__ln_f__bias=torch.zeros(9))
    with pytest.raises(InputError, match="does not load"):
        load_causal_lm(folder)

    GPT2ForSequenceClassification(config).save_pretrained(folder)
    with pytest.raises(InputError, match=r"does not know \(score.weight\)"):
        load_causal_lm(folder)


def test_a_missing_head_is_an_error_where_it_is_not_tied(folder: Path, config: GPT2Config) -> None:
    config.tie_word_embeddings = False
    GPT2LMHeadModel(config).save_pretrained(folder)
    rewrite(folder, lm_head__weight=None)
    with pytest.raises(InputError, match=r"lack weights that it needs \(lm_head.weight\)"):
        load_causal_lm(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    rewrite(folder, transformer__ln_f__bias=torch.full((8,), value))
    with pytest.raises(InputError, match=r"NaN or infinity \(transformer.ln_f.bias\)"):
        load_causal_lm(folder)


@pytest.mark.parametrize("model_type", ["mine", "t5"])
def test_a_model_with_code_of_its_own_is_refused_without_a_question(
    folder: Path, model_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "conf.C", "AutoModelForCausalLM": "code.M"}
    (folder / "config.json").write_text(json.dumps(content | {"model_type": model_type, "auto_map": classes}))
    for load in (load_config, load_causal_lm):
        with pytest.raises(InputError, match="needs custom code, which cocomix does not run"):
            load(folder)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", 7])
def test_an_index_cannot_name_files_elsewhere(folder: Path, name: object) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    with pytest.raises(InputError, match=r"model.safetensors.index.json does not name files of this folder only"):
        load_causal_lm(folder)


def test_what_is_not_there_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="does not load"):
        load_causal_lm(tmp_path / "missing")


def test_a_tokenizer_may_be_smaller_than_the_embedding_but_not_larger(config: GPT2Config) -> None:
    check_vocabulary(config, 20, "model")
    with pytest.raises(InputError, match="the tokenizer other has 21 tokens, but the model model only 20 embeddings"):
        check_vocabulary(config, 21, "model", "other")
