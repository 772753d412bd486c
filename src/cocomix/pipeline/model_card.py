"""The model card of a trained model: `README.md` next to its weights, in the form of the Hugging Face Hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PretrainedConfig

from cocomix.common import files, integrity, portable
from cocomix.common.document import Block, Bullets, Code, Heading, Table, literal, to_markdown
from cocomix.common.errors import InputError
from cocomix.models.configuration import StackedConfig
from cocomix.models.loading import load_config
from cocomix.pipeline.stage import RECORD_FILE
from cocomix.training.run import Run, load_run, output_folder

CARD_FILE = "README.md"
REPOSITORY = "REPO_ID"
"""Stands in a card for the name of the repository, or the folder, that holds the model."""
METHODS = {
    "ntp": "It was trained to predict the next token and nothing else.",
    "kd": "It was trained to predict the next token, and the distribution over it that a teacher predicts.",
    "pause": "It inserts a learned vector in mid-depth, and was trained to predict the next token.",
    "mtp": "It was trained to predict several next tokens, each by its own last block.",
}
MIXING = {
    "interleave": "inserts the strongest of its predictions after each token, as one continuous vector",
    "add": "adds the strongest of its predictions to each token's hidden state, as one continuous vector",
    "none": "uses its predictions for nothing else: concepts are a training signal only",
}
NAMES = {"sae": "SAE", "predictions": "the teacher's stored predictions"}
PAPER = """@article{tack2025cocomix,
  title   = {LLM Pretraining with Continuous Concepts},
  author  = {Jihoon Tack and Jack Lanchantin and Jane Yu and Andrew Cohen and Ilia Kulikov and Janice Lan and Shibo Hao
             and Yuandong Tian and Jason Weston and Xian Li},
  journal = {arXiv preprint arXiv:2502.08524},
  year    = {2025}
}"""


def write_card(folder: Path, run: Path | None = None) -> None:
    """Write the model card of the model in `folder`, of the finished run in `run` (by default the same folder).

    Figures of teacher, SAE and corpus are read from the run's output folder if they are still there.

    Raises:
        InputError: `run` holds no finished run.
    """
    run = run or folder
    record, artifacts = load_run(run), _artifacts(output_folder(run))
    config = load_config(folder)
    blocks = [
        Heading(1, literal(f"{record.recipe['name']}: {record.name}")),
        _method(record, config),
        Heading(2, "Use"),
        *_use(config),
        Heading(2, "Figures"),
        *_figures(record),
        Heading(2, "Training"),
        Bullets([*_training(record), *_origins(record, artifacts)]),
        Code("yaml", _settings(record)),
        Heading(2, "Cost"),
        _cost(record),
        Heading(2, "Limits"),
        Bullets(_limits(record, config)),
        Heading(2, "Citation"),
        Code("bibtex", PAPER),
    ]
    header = _header(record, config).to_yaml(line_break="\n")
    card = ModelCard(f"---\n{header}\n---\n\n{to_markdown(blocks)}", ignore_metadata_errors=True)
    with integrity.replaced(folder, CARD_FILE):
        files.write_text(folder / CARD_FILE, str(card))


def _artifacts(output: Path) -> dict[str, dict[str, Any]]:
    """Return what the stages of the output folder recorded, by the name of their folder."""
    found = {}
    for path in sorted(output.glob(f"*/{RECORD_FILE}")):
        with suppress(OSError, InputError):
            found[path.parent.name] = files.read_json(path)
    return found


def _header(run: Run, config: PretrainedConfig) -> ModelCardData:
    """Return the metadata that the Hub reads."""
    figures = {"perplexity": run.metrics["perplexity"], "bits_per_byte": run.metrics["bits_per_byte"]}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["cocomix", run.method, config.get_text_config().model_type, "arxiv:2502.08524"],
        model_name=run.name,
        eval_results=[
            EvalResult("text-generation", "validation", "validation documents of the corpus", kind, round(value, 4))
            for kind, value in figures.items()
        ],
    )


def _method(run: Run, config: PretrainedConfig) -> str:
    """Describe what the model is."""
    backbone = config.get_text_config()
    size = f"A `{backbone.model_type}` language model of {run.activated_parameters:,} activated parameters."
    mixer = run.recipe["students"].get(run.name, {}).get("mixer") or {}
    if run.method != "cocomix":
        method = METHODS.get(run.method, f"Its training method is `{run.method}`.")
    elif mixer.get("content", "concepts") != "concepts":
        use = "as a training signal only" if mixer.get("mixing") == "none" else "and mixes them into its own"
        method = f"It predicts a teacher's hidden states in mid-depth {use}."
    else:
        method = (
            "It was trained to predict the next token and, in mid-depth, which concepts (latents of a sparse "
            f"autoencoder) a teacher has active at each token. It {MIXING[mixer.get('mixing', 'interleave')]} "
            "(continuous concept mixing, arXiv 2502.08524)."
        )
    return f"{size} {method}"


def _use(config: PretrainedConfig) -> list[Block]:
    """Describe how to load the model, read its concepts and steer it."""
    is_stacked = isinstance(config, StackedConfig)
    trust = ", trust_remote_code=True" if is_stacked else ""
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{REPOSITORY}"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("{REPOSITORY}")',
        'inputs = tokenizer("The", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
    ]
    if getattr(config, "content", None) == "concepts":
        lines.append("model(**inputs, output_concepts=True).concept_logits  # (1, tokens, concepts)")
    if getattr(config, "mixes_concepts", False):
        lines.append("model.generate(**inputs, max_new_tokens=40, steering={12: 5.0})  # raise concept 12")
    note = (
        "The model brings its code along. With the package `cocomix` installed, `import cocomix` takes the place of "
        "`trust_remote_code`, and `cocomix inspect`, `cocomix generate --steer` and `cocomix app` show and change its "
        "concepts."
        if is_stacked
        else "The model is a plain decoder: every tool for its architecture takes it."
    )
    return [Code("python", "\n".join(lines)), note]


def _figures(run: Run) -> list[Block]:
    """Return the figures on the validation text."""
    metrics = run.metrics
    rows = [
        ["loss, nats per token", f"{metrics['loss']:.4f}"],
        ["perplexity per token", f"{metrics['perplexity']:.2f}"],
        ["bits per byte", f"{metrics['bits_per_byte']:.4f}"],
    ]
    if "concept_recall" in metrics:
        rows.append(["recall of the concept labels among the predicted concepts", f"{metrics['concept_recall']:.1%}"])
    if "token_table_recall" in metrics:
        table = f"{metrics['token_table_recall']:.1%}"
        rows.append(["the same for a table from the current token to its most frequent labels", table])
    return [Table(["on validation documents", "value"], rows)]


def _training(run: Run) -> list[str]:
    """Describe the text, the length of the training and the environment."""
    environment = run.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    commit = f", commit `{environment['commit']}`" if environment.get("commit") else ""
    return [
        f"Text: `{_plain(run.recipe['corpus']['source'])}`, in blocks of {run.block_size} tokens.",
        f"{run.tokens:,} training tokens, {run.tokens / run.activated_parameters:.1f} per activated parameter; seed "
        f"{run.seed}.",
        f"{environment.get('date', 'unknown date')}, {literal(str(environment.get('hardware', 'unknown hardware')))}"
        f"{commit}; {literal(versions)}.",
        "`run.json` holds the complete recipe, the learning curve and the environment.",
    ]


def _origins(run: Run, artifacts: dict[str, dict[str, Any]]) -> list[str]:
    """Describe teacher, SAE and labels as far as the run learned from them and they are still what they were."""
    found = []
    for kind, describe in (("teacher", _teacher), ("sae", _sae), ("labels", _labels)):
        learned = run.preparation.get(kind, {}).get("fingerprint")
        records = [record for name, record in artifacts.items() if name.partition("-")[0] == kind]
        matching = [each for each in records if learned is not None and each.get("fingerprint") == learned]
        found += [describe(each["summary"], run) for each in matching[:1]]
    return found


def _teacher(summary: dict[str, Any], run: Run) -> str:
    source = run.recipe["teacher"]["source"]
    trained = f"`{_plain(source)}`" if source else f"trained on {summary.get('tokens', 0):,} tokens of the same text"
    return f"Teacher: {trained}; its validation loss is {summary['metrics']['loss']:.4f} nats per token."


def _sae(summary: dict[str, Any], run: Run) -> str:
    source, quality = run.recipe["sae"]["source"], summary.get("quality") or {}
    origin = f"`{_plain(source)}`" if source else "trained here"
    variance = quality.get("fraction_variance_unexplained")
    measured = "" if variance is None else f"; fraction of variance unexplained {variance:.3f}"
    return (
        f"SAE: {origin}, {summary['d_sae']:,} latents, after block {run.recipe['sae']['teacher_layer']} of the teacher"
        f"{measured}."
    )


def _labels(summary: dict[str, Any], run: Run) -> str:
    own = run.recipe["students"].get(run.name, {}).get("labels") or {}
    control = [f"{key} {own[key]}" for key in ("offset", "control") if own.get(key) not in (None, 0, "none")]
    selection = own.get("selection") or summary["selection"]
    described = ", ".join([f"by `{_plain(selection)}`", *control])
    return f"Labels: {summary['labels_per_token']} per token, {described}."


def _settings(run: Run) -> str:
    """Return the student's part of the recipe as YAML, without what it leaves open."""
    student = {key: value for key, value in run.recipe["students"].get(run.name, {}).items() if value is not None}
    text = yaml.safe_dump({"training": run.recipe["training"], run.name: student}, sort_keys=False)
    return text.replace("`", "'").rstrip()


def _cost(run: Run) -> Table:
    """Return the FLOPs of the model and of what it learned from."""
    rows = [["its own training", _flops(run.tokens * run.training_flops_per_token)]]
    if run.teacher_flops_per_token:
        rows.append(["teacher and SAE during its training", _flops(run.tokens * run.teacher_flops_per_token)])
    for kind, made in run.preparation.items():
        rows.append([f"{NAMES.get(kind, kind)}, once for all students", _flops(made["flops"])])
    rows.append(["time of its training steps", f"{run.timing['seconds']:,.0f} s"])
    return Table(["cost", "FLOPs or seconds"], rows)


def _flops(flops: float | None) -> str:
    return "unknown" if flops is None else f"{flops:.2e}"


def _limits(run: Run, config: PretrainedConfig) -> list[str]:
    """Return what the figures do not show."""
    found = [
        "The figures are of one training on one corpus; another seed or another text gives others.",
        "It was trained to continue text, not to follow instructions, and was not evaluated for bias, harm or truth.",
    ]
    if run.preparation:
        found.append(
            "It learned from a teacher that may have read more text, or be a better model: a lower loss than that of a "
            "model without a teacher does not show that concepts are the reason."
        )
    if getattr(config, "content", None) == "concepts":
        found.append(
            "A concept is a latent of an SAE, and its name is a hint. Whether steering a concept makes it appear in "
            "the text is to be measured for each (`cocomix evaluate steering`)."
        )
    return found


def _plain(text: object) -> str:
    """Return a name or short path for a code span, which cannot contain backticks and backslashes."""
    return portable.short(str(text)).replace("`", "'").replace("\\", "/")
