"""Sentences of a report: differences between runs, caveats, and the provenance of the concepts."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from cocomix.concepts.sae_quality import quality_warnings
from cocomix.data.packing import text_changed_note
from cocomix.data.summary import skipped
from cocomix.evaluation.verdicts import LEVEL, LOSS_MARGIN, Verdict
from cocomix.reporting.concept_tables import explained_share

VERDICTS = {
    Verdict.LOWER: "`{run}` is better than `{baseline}`",
    Verdict.HIGHER: "`{run}` is worse than `{baseline}`",
    Verdict.SAME: "no difference of interest",
    Verdict.UNDECIDED: "not decided",
}
"""Sentence for each verdict on a difference between losses."""


def baseline_of(results: dict[str, Any]) -> str:
    """Return the name of the baseline group, or of the only group."""
    return results["comparisons"][0]["baseline"] if results["comparisons"] else next(iter(results["groups"]))


def comparison_sentences(results: dict[str, Any]) -> list[str]:
    """Describe each student's measured difference from the baseline, and what else differs, without interpretation."""
    sentences = list(results.get("notes", []))
    for comparison in results["comparisons"]:
        run, baseline = comparison["run"], comparison["baseline"]
        difference = comparison["loss_difference"]
        word = "lower" if difference < 0 else "higher"
        trained = results["students"][results["groups"][run][0]]["tokens"]
        sentence = (
            f"After {trained:,} tokens `{run}` ends with a validation loss {abs(difference):.4f} nats {word} than "
            f"`{baseline}`{_certainty(results, comparison)}"
        )
        tokens, bound = comparison["tokens_to_baseline_loss"], comparison["tokens_at_most"]
        if tokens is None:
            averaged = " by the mean over seeds" if comparison["seeds"][0] > 1 else ""
            sentence += f"; it does not reach the final loss of `{baseline}`{averaged}{_tokens_over_seeds(comparison)}."
        else:
            sentence += (
                f"; it reaches the final loss of `{baseline}` {'at or before' if bound else 'after'} {tokens:,.0f} "
                f"tokens{_shares(comparison, bound)}."
            )
        sentences.append(sentence + _baseline_to_final_loss(comparison, trained) + _verdicts(results, comparison))
    return sentences


def _baseline_to_final_loss(comparison: dict[str, Any], trained: int) -> str:
    """Compare tokens at the other level, the final loss of the run; results of older versions lack it."""
    if (found := comparison.get("baseline_to_final_loss")) is None:
        return ""
    run, baseline = comparison["run"], comparison["baseline"]
    if found["tokens"] is None:
        return f" `{baseline}` does not reach the final loss of `{run}` within {found['most']:,.0f} tokens."
    ratio = trained / found["tokens"]
    return (
        f" `{baseline}` reaches the final loss of `{run}` after {found['tokens']:,.0f} tokens: at this level "
        f"`{run}` takes {_relative(ratio)} tokens."
    )


def repetitions(results: dict[str, Any], names: Iterable[str]) -> str:
    """Describe what differs between the repetitions of groups: seeds, or replicates that share no preparation.

    Returns:
        `replicates`; or `seeds`, with the artifacts that several of them share.
    """
    shared, used = shared_preparation(results, names), _preparations(results, names)
    if used and not shared:
        return "replicates"
    return f"seeds (same {_listed(shared)})" if shared else "seeds"


def _verdicts(results: dict[str, Any], comparison: dict[str, Any]) -> str:
    """State the verdicts on a difference."""
    repeated = repetitions(results, (comparison["run"], comparison["baseline"]))
    return "".join(
        f" Over {sample}: {VERDICTS[Verdict(verdict)].format(**comparison)}."
        for sample, verdict in (
            (repeated, comparison["verdict_over_seeds"]),
            ("validation documents, for the models trained here", comparison["verdict_over_documents"]),
        )
        if verdict is not None
    )


def verdict_note(results: dict[str, Any]) -> str | None:
    """Explain the verdicts of a comparison; None without verdicts."""
    counts = [
        sum(comparison[f"verdict_over_{sample}"] is not None for comparison in results["comparisons"])
        for sample in ("seeds", "documents")
    ]
    if not any(counts):
        return None
    note = (
        f"Verdicts: a difference of more than {LOSS_MARGIN:g} nats per token is of interest. Better or worse: the "
        "difference exceeds this margin; no difference of interest: it lies within the margin; not decided: neither is "
        f"certain at {1 - LEVEL:.0%}"
    )
    if max(counts) > 1:
        note += f", for up to {max(counts)} comparisons together (Holm)"
    return note + "."


def _certainty(results: dict[str, Any], comparison: dict[str, Any]) -> str:
    """Describe the uncertainty of a difference over seeds and over validation documents."""
    found = []
    if (seeds := comparison["loss_over_seeds"]) is not None:
        repeated = repetitions(results, (comparison["run"], comparison["baseline"]))
        low, high = seeds["interval"]
        found.append(
            f"standard deviation over {seeds['seeds']} {repeated} {seeds['sd']:.4f}, "
            f"95 % interval {low:+.4f} to {high:+.4f}"
        )
    if documents := comparison["documents"]:
        found.append(_over_documents(documents))
    return f" ({'; '.join(found)})" if found else ""


def _over_documents(documents: dict[str, Any]) -> str:
    """Describe the interval and the p-value over validation documents."""
    count = f"{documents['documents']:,} validation document{'s' * (documents['documents'] > 1)}"
    if documents["interval"] is None:
        return f"{count} {'are' if documents['documents'] > 1 else 'is'} too few for an interval"
    low, high = documents["interval"]
    return f"95 % interval over {count} {low:+.4f} to {high:+.4f}, p = {documents['p_value']:.2g}"


def _tokens_over_seeds(comparison: dict[str, Any]) -> str:
    """Describe the relative number of tokens over seeds, each seed compared by itself."""
    if (over_seeds := comparison["tokens_over_seeds"]) is None:
        return ""
    if (difference := over_seeds["difference"]) is None:
        return f"; reached by {over_seeds['reached']} of {over_seeds['seeds']} seeds"
    if over_seeds["at_most"]:
        if difference["mean"] >= 0:  # reached by the only evaluation
            return ""
        return f"; mean over {over_seeds['seeds']} seeds at most {difference['mean']:+.1%}"
    low, high = difference["interval"]
    mean = f"mean over {over_seeds['seeds']} seeds {difference['mean']:+.1%}"
    return f"; {mean}, 95 % interval {low:+.1%} to {high:+.1%}"


def _shares(comparison: dict[str, Any], bound: bool) -> str:
    """Relate tokens and FLOPs to the baseline's. The first evaluation only bounds them, from above."""
    over_seeds = _tokens_over_seeds(comparison)
    if bound and comparison["tokens_ratio"] >= 1:
        return f" (its first evaluation{over_seeds})"
    first = "its first evaluation: at least " if bound else ""
    return (
        f" ({first}{_relative(comparison['tokens_ratio'])} tokens{over_seeds}) and {'at most ' if bound else ''}"
        f"{comparison['flops_to_baseline_loss']:.2e} FLOPs of its own training "
        f"({'at most ' if bound and comparison['flops_ratio'] > 1 else 'at least ' if bound else ''}"
        f"{_relative(comparison['flops_ratio'])} FLOPs)"
    )


def _relative(ratio: float) -> str:
    """Express a cost relative to the baseline's."""
    return f"{1 - ratio:.1%} fewer" if ratio <= 1 else f"{ratio - 1:.1%} more"


def concept_sentences(students: dict[str, Any]) -> list[str]:
    """Compare the concept predictions of each student with tables that read one token, or two."""
    sentences = []
    for name, student in students.items():
        metrics = student["metrics"]
        if "token_table_recall" not in metrics or "concept_recall" not in metrics:
            continue
        ours, table, constant = (metrics[key] for key in ("concept_recall", "token_table_recall", "constant_recall"))
        sentence = f"`{name}` predicts {ours:.1%} of the labels; a table that reads only the current token, {table:.1%}"
        if ours <= table:
            sentence += ": the model predicts no more than the table"
        elif table - constant > (ours - constant) / 2:
            sentence += (
                f": most of the recall beyond the most frequent labels ({constant:.1%}) follows from the current token "
                "alone"
            )
        if (explained := explained_share(metrics, "token_table_loss")) is not None:
            sentence += f". The current token explains {explained:.0%} of what it learns of its labels"
        if (by_two := explained_share(metrics, "bigram_table_loss")) is not None:
            sentence += f", the previous and the current token {by_two:.0%}"
        sentences.append(sentence + ".")
    return sentences


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def caveats(results: dict[str, Any]) -> list[str]:
    """List what these results do not show, and which costs they leave out."""
    students = results["students"].values()
    longest = max(students, key=lambda student: student["tokens"])
    largest, per_parameter = longest["tokens"], longest["tokens"] / longest["activated_parameters"]
    lines = [
        _seed_caveat(results),
        f"Trained on {largest:,} tokens, {per_parameter:.1f} per parameter: these results do not show how larger "
        "models or longer runs compare.",
        *_teacher_against_baseline(results),
    ]
    cost = preparation_flops(results)
    if cost:
        parts = ", ".join(f"{name} {value:.2e}" for name, value in cost.items())
        lines.append(
            f"A student's FLOPs count only its own training. Preparing the concepts ({parts} FLOPs) is a one-time "
            "cost; `all shared` adds an equal share of it to each student that uses it, and the teacher's computation "
            "during training"
            + ("; `all for one run` adds all of it." if "single_run_flops" in results.get("equal_cost", {}) else ".")
        )
    elsewhere = sorted({k for s in students for k, each in s["preparation"].items() if each["flops"] is None})
    if elsewhere:
        lines.append(f"Not counted, because the cost is unknown: {', '.join(elsewhere)} from elsewhere.")
    if len({student["environment"]["hardware"] for student in students}) > 1:
        lines.append("These runs were trained on different hardware, so their times are not comparable.")
    return lines


def _teacher_against_baseline(results: dict[str, Any]) -> list[str]:
    """Compare the teacher with the baseline in bits per byte, which do not depend on the tokenizer."""
    teacher, name = results.get("teacher", {}), baseline_of(results)
    baseline = [results["students"][member] for member in results["groups"][name]]
    if "tokens" not in teacher or "bits_per_byte" not in teacher["metrics"]:
        return []
    bits = fmean(run["metrics"]["bits_per_byte"] for run in baseline)
    flops = teacher["tokens"] * teacher["training_flops_per_token"]
    better = teacher["metrics"]["bits_per_byte"] < bits
    line = (
        f"The teacher was trained on {teacher['tokens']:,} tokens with {flops:.2e} FLOPs and reaches "
        f"{teacher['metrics']['bits_per_byte']:.4f} bits per byte; `{name}`, on {baseline[0]['tokens']:,} tokens with "
        f"{baseline[0]['training_flops']:.2e} FLOPs, reaches {bits:.4f}."
    )
    if better:
        line += f" The teacher is the better model, so a student's gain over `{name}` may come from the teacher's data."
    return [line]


def _seed_caveat(results: dict[str, Any]) -> str:
    """Describe which variation the results measure: over seeds, over documents, or over documents only."""
    seeds = ", ".join(map(str, sorted({student["seed"] for student in results["students"].values()})))
    once = [name for name, members in results["groups"].items() if len(members) == 1]
    if not once:
        return (
            f"Seeds {seeds}: the deviation over seeds measures the effect of retraining; the interval over validation "
            f"documents measures the effect of other validation text.{_shared_caveat(results)}"
        )
    subject = (
        f"One seed ({seeds}) per student" if len(once) == len(results["groups"]) else f"One seed of {', '.join(once)}"
    )
    return (
        f"{subject}: a small difference may be chance, because the interval over validation documents does not include "
        "seed-to-seed variation, which was not measured."
    )


def _shared_caveat(results: dict[str, Any]) -> str:
    """State whether the variation over teachers, SAEs and labels is measured."""
    if shared := shared_preparation(results, results["groups"]):
        return f" All seeds share the same {_listed(shared)}, so the effect of others was not measured."
    if not _preparations(results, results["groups"]):
        return ""
    return " Each seed is a replicate with its own teacher, SAE and labels, so their effect is included."


def _listed(kinds: list[str]) -> str:
    return ", ".join("SAE" if kind == "sae" else kind for kind in kinds)


def shared_preparation(results: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Return the kinds of artifacts of which two seeds of one of the groups learn from the same one."""
    return [
        kind
        for kind, by_group in _preparations(results, names).items()
        if any(len({*fingerprints}) < len(fingerprints) for fingerprints in by_group)
    ]


def _preparations(results: dict[str, Any], names: Iterable[str]) -> dict[str, list[list[str]]]:
    """Return the fingerprints of the artifacts of each group's runs, by kind; groups without artifacts are left out."""
    found: dict[str, list[list[str]]] = {}
    for kind in ("teacher", "sae", "labels", "predictions", "losses"):
        for name in names:
            members = [results["students"][member] for member in results["groups"].get(name, ())]
            prepared = [member.get("preparation", {}) for member in members]
            if fingerprints := [each[kind]["fingerprint"] for each in prepared if kind in each]:
                found.setdefault(kind, []).append(fingerprints)
    return found


def preparation_flops(results: dict[str, Any]) -> dict[str, float]:
    """Sum the FLOPs of the artifacts that these students learn from, by kind; unknown costs are left out."""
    flops_of = {
        (kind, each["fingerprint"]): each["flops"]
        for student in results["students"].values()
        for kind, each in student["preparation"].items()
        if each["flops"] is not None
    }
    cost: dict[str, float] = {}
    for (kind, _), flops in flops_of.items():
        cost[kind] = cost.get(kind, 0.0) + flops
    return cost


def provenance_lines(results: dict[str, Any]) -> list[str]:
    """Describe corpus, teacher, SAE and labels."""
    lines = []
    if corpus := results.get("corpus"):
        packed, documents = corpus["packed"], corpus["documents"]
        counted = ""
        if documents:
            counted = (
                f", {documents['train_documents']:,} training and {documents['validation_documents']:,} validation "
                f"documents, {_counted(documents['duplicates_dropped'], 'duplicate')} dropped"
            )
            if left_out := skipped(documents):
                counted += f", skipped: {left_out}"
        lines.append(
            f"Corpus `{corpus['source']}`{counted}: {packed['train_tokens']:,} training and "
            f"{packed['validation_tokens']:,} validation tokens in blocks of {packed['block_size']}, "
            f"vocabulary {packed['vocab_size']:,}, {packed['bytes_per_token']:.2f} bytes per token."
        )
        if changed := packed.get("text_changed"):
            lines.append(text_changed_note(changed, "the validation text"))
    if teacher := results.get("teacher"):
        size = f", {teacher['stored_parameters'] / 1e6:.2f}M parameters" if "stored_parameters" in teacher else ""
        trained = f", trained on {teacher['tokens']:,} tokens" if "tokens" in teacher else f" (`{teacher['source']}`)"
        bits = f", {bits:.4f} bits per byte" if (bits := teacher["metrics"].get("bits_per_byte")) else ""
        lines.append(f"Teacher{size}{trained}: validation loss {teacher['metrics']['loss']:.4f}{bits}.")
    if backbone := results.get("backbone"):
        lines.append(
            f"Students start from the weights of `{backbone['source']}`, {backbone['stored_parameters'] / 1e6:.2f}M "
            f"parameters: validation loss {backbone['metrics']['loss']:.4f} before training."
        )
    if sae := results.get("sae"):
        quality = sae["quality"]
        each = quality.get("dimension_variance_unexplained")  # missing in older records
        alike = "" if each is None else f" ({each:.3f} if every dimension counts alike)"
        lines.append(
            f"SAE, {sae['d_sae']:,} latents, {sae['k']} active per token: fraction of variance unexplained "
            f"{quality['fraction_variance_unexplained']:.3f}{alike}, dead latents {quality['dead_share']:.1%} "
            f"(never active on {quality['tokens']:,} validation tokens), teacher's loss "
            f"{quality['teacher_loss']:.4f} → {quality['spliced_loss']:.4f} with the reconstruction spliced in "
            f"({quality['zero_loss']:.4f} with zeros; {quality['loss_recovered']:.1%} recovered)."
        )
        lines += [f"Warning: {line}." for line in quality_warnings(quality)]
    if labels := results.get("labels"):
        lines.append(
            f"Labels by `{labels['selection']}`, {labels['labels_per_token']} per token: "
            f"{labels['labelled_share']:.1%} of the {'validation' if labels['online'] else 'training'} tokens have at "
            f"least one, {labels['full_share']:.1%} have all"
            + (
                "."
                if labels["selection"] == "activation"
                else f"; {labels['fewer_positive_share']:.1%} of the labeled tokens have fewer than all, or a label "
                "whose score is not positive."
            )
        )
        if (share := labels.get("differing_share")) is not None:
            lines.append(
                f"Labels computed in {labels['precision']}: {share:.2%} differ from those of float32, on a sample."
            )
    return lines
