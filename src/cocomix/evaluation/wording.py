"""What a report says in words about figures: differences, what they mean, where the concepts came from."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from cocomix.data.packing import text_changed_note
from cocomix.evaluation.verdicts import LEVEL, LOSS_MARGIN, Verdict

VERDICTS = {
    Verdict.LOWER: "`{run}` is better than `{baseline}`",
    Verdict.HIGHER: "`{run}` is worse than `{baseline}`",
    Verdict.SAME: "no difference of interest",
    Verdict.UNDECIDED: "not decided",
}
"""What a verdict on a difference between losses says."""


def baseline_of(results: dict[str, Any]) -> str:
    """The group that the others are compared with, or the only one."""
    return results["comparisons"][0]["baseline"] if results["comparisons"] else next(iter(results["groups"]))


def comparison_sentences(results: dict[str, Any]) -> list[str]:
    """What was measured of each student against the baseline, in words, and no more than that."""
    sentences = []
    for comparison in results["comparisons"]:
        run, baseline = comparison["run"], comparison["baseline"]
        difference = comparison["loss_difference"]
        word = "lower" if difference < 0 else "higher"
        trained = results["students"][results["groups"][run][0]]["tokens"]
        sentence = (
            f"After {trained:,} tokens `{run}` ends with a validation loss {abs(difference):.4f} nats {word} than "
            f"`{baseline}`{_certainty(comparison)}"
        )
        tokens, bound = comparison["tokens_to_baseline_loss"], comparison["tokens_at_most"]
        if tokens is None:
            of_mean = " by the mean over seeds" if comparison["seeds"][0] > 1 else ""
            sentence += f"; the final loss of `{baseline}` was not reached{of_mean}{_tokens_over_seeds(comparison)}."
        else:
            at_most = "at most " if bound else ""
            sentence += (
                f"; it reaches the final loss of `{baseline}` after {at_most}{tokens:,.0f} tokens "
                f"({_relative(comparison['tokens_ratio'], bound)} tokens{_tokens_over_seeds(comparison)}) and "
                f"{at_most}{comparison['flops_to_baseline_loss']:.2e} FLOPs of its own training "
                f"({_relative(comparison['flops_ratio'], bound)} FLOPs)."
            )
        sentences.append(sentence + _verdicts(comparison))
    return sentences


def _verdicts(comparison: dict[str, Any]) -> str:
    """State the verdicts on a difference."""
    return "".join(
        f" Over {sample}: {VERDICTS[Verdict(verdict)].format(**comparison)}."
        for sample, verdict in (
            ("seeds", comparison["verdict_over_seeds"]),
            ("validation documents, of the models trained here", comparison["verdict_over_documents"]),
        )
        if verdict is not None
    )


def verdict_note(results: dict[str, Any]) -> str | None:
    """Explain the verdicts of a comparison; None if there is none."""
    counts = [
        sum(comparison[f"verdict_over_{sample}"] is not None for comparison in results["comparisons"])
        for sample in ("seeds", "documents")
    ]
    if not any(counts):
        return None
    note = (
        f"Verdicts: a difference is of interest beyond {LOSS_MARGIN:g} nats per token. Better and worse: it is beyond "
        f"that; no difference of interest: it is within; not decided: neither is certain at {1 - LEVEL:.0%}"
    )
    if max(counts) > 1:
        note += f", for up to {max(counts)} comparisons together (Holm)"
    return note + "."


def _certainty(comparison: dict[str, Any]) -> str:
    """How sure seeds and validation documents make of a difference."""
    found = []
    if (seeds := comparison["loss_over_seeds"]) is not None:
        low, high = seeds["interval"]
        found.append(
            f"standard deviation over {seeds['seeds']} seeds {seeds['sd']:.4f}, 95 % interval {low:+.4f} to {high:+.4f}"
        )
    if documents := comparison["documents"]:
        low, high = documents["interval"]
        found.append(
            f"95 % interval over {documents['documents']:,} validation documents {low:+.4f} to {high:+.4f}, "
            f"p = {documents['p_value']:.2g}"
        )
    return f" ({'; '.join(found)})" if found else ""


def _tokens_over_seeds(comparison: dict[str, Any]) -> str:
    """State what the seeds say of a share of tokens, each by itself."""
    if (over_seeds := comparison["tokens_over_seeds"]) is None:
        return ""
    if (difference := over_seeds["difference"]) is None:
        return f"; reached by {over_seeds['reached']} of {over_seeds['seeds']} seeds"
    if over_seeds["at_most"]:
        return f"; mean over {over_seeds['seeds']} seeds at most {difference['mean']:+.1%}"
    low, high = difference["interval"]
    mean = f"mean over {over_seeds['seeds']} seeds {difference['mean']:+.1%}"
    return f"; {mean}, 95 % interval {low:+.1%} to {high:+.1%}"


def _relative(ratio: float, at_most: bool) -> str:
    """A cost against the baseline's; `at_most` if it is an upper bound."""
    if ratio <= 1:
        return f"{'at least ' if at_most else ''}{1 - ratio:.1%} fewer"
    return f"{'at most ' if at_most else ''}{ratio - 1:.1%} more"


def concept_sentences(students: dict[str, Any]) -> list[str]:
    """Set the recall of each student's concepts beside what the current token alone gives."""
    sentences = []
    for name, student in students.items():
        metrics = student["metrics"]
        if "token_table_recall" not in metrics or "concept_recall" not in metrics:
            continue
        ours, table, constant = (metrics[key] for key in ("concept_recall", "token_table_recall", "constant_recall"))
        sentence = f"Of the labels `{name}` predicts {ours:.1%}, a table that sees the current token only {table:.1%}"
        if ours <= table:
            sentence += ": the model predicts no more than the table"
        elif table - constant > (ours - constant) / 2:
            sentence += (
                f": most of what is predicted beyond the most frequent labels ({constant:.1%}) follows from the "
                "current token alone"
            )
        sentences.append(sentence + ".")
    return sentences


def caveats(results: dict[str, Any]) -> list[str]:
    """What a difference in these results means, and what it leaves out."""
    students = results["students"].values()
    longest = max(students, key=lambda student: student["tokens"])
    largest, per_parameter = longest["tokens"], longest["tokens"] / longest["activated_parameters"]
    lines = [
        _of_seeds(results),
        f"Trained on {largest:,} tokens, {per_parameter:.1f} per parameter: nothing here says how larger models or "
        "longer runs compare.",
        *_teacher_against_baseline(results),
    ]
    cost = preparation_flops(results)
    if cost:
        parts = ", ".join(f"{name} {value:.2e}" for name, value in cost.items())
        lines.append(
            f"FLOPs of a student are those of its own training. What the concepts cost before it ({parts} FLOPs) is "
            "spent once; `all shared` adds to each student an equal part of what it shares with others, and what its "
            "teacher computes while it trains"
            + ("; `all for one run` adds the whole." if "single_run_flops" in results.get("equal_cost", {}) else ".")
        )
    elsewhere = sorted({k for s in students for k, made in s["preparation"].items() if made["flops"] is None})
    if elsewhere:
        lines.append(f"Made elsewhere, at a cost that is not counted: {', '.join(elsewhere)}.")
    if len({student["environment"]["hardware"] for student in students}) > 1:
        lines.append("These runs were trained on different hardware: their times do not compare.")
    return lines


def _teacher_against_baseline(results: dict[str, Any]) -> list[str]:
    """Compare the teacher with the baseline, as the bits per byte that do not depend on a tokenizer."""
    teacher, name = results.get("teacher", {}), baseline_of(results)
    baseline = [results["students"][member] for member in results["groups"][name]]
    if "tokens" not in teacher or "bits_per_byte" not in teacher["metrics"]:
        return []
    bits = fmean(run["metrics"]["bits_per_byte"] for run in baseline)
    flops = teacher["tokens"] * teacher["training_flops_per_token"]
    better = teacher["metrics"]["bits_per_byte"] < bits
    line = (
        f"The teacher was trained on {teacher['tokens']:,} tokens with {flops:.2e} FLOPs and is at "
        f"{teacher['metrics']['bits_per_byte']:.4f} bits per byte, `{name}` on {baseline[0]['tokens']:,} with "
        f"{baseline[0]['training_flops']:.2e} at {bits:.4f}."
    )
    if better:
        line += f" It is the better model, so what a student gains over `{name}` may be what the teacher has read."
    return [line]


def _of_seeds(results: dict[str, Any]) -> str:
    """What is known of chance in the training."""
    seeds = ", ".join(map(str, sorted({student["seed"] for student in results["students"].values()})))
    once = [name for name, members in results["groups"].items() if len(members) == 1]
    if not once:
        return (
            f"Seeds {seeds}: the deviation from seed to seed says what training again changes, the interval over "
            f"validation documents what other validation text would.{_shared_preparation(results)}"
        )
    of_whom = (
        f"One seed ({seeds}) per student" if len(once) == len(results["groups"]) else f"One seed of {', '.join(once)}"
    )
    return (
        f"{of_whom}: how much these figures vary from seed to seed was not measured, so a small difference may be "
        "chance; the interval over validation documents does not know of it."
    )


def _shared_preparation(results: dict[str, Any]) -> str:
    """Name what all seeds of the students have in common, so that its variation is not measured."""
    made: dict[str, set[str]] = {}
    for student in results["students"].values():
        for kind, each in student["preparation"].items():
            made.setdefault(kind, set()).add(each["fingerprint"])
    shared = [kind for kind in ("teacher", "sae", "labels") if kind in made and len(made[kind]) == 1]
    if not shared:
        return ""
    return f" Seeds share the same {', '.join(shared)}, so neither says what another would change."


def preparation_flops(results: dict[str, Any]) -> dict[str, float]:
    """FLOPs of each kind of thing that was made once before these students were trained, as far as it was here."""
    made = {
        (kind, each["fingerprint"]): each["flops"]
        for student in results["students"].values()
        for kind, each in student["preparation"].items()
        if each["flops"] is not None
    }
    cost: dict[str, float] = {}
    for (kind, _), flops in made.items():
        cost[kind] = cost.get(kind, 0.0) + flops
    return cost


def provenance_lines(results: dict[str, Any]) -> list[str]:
    """Where the concepts came from: corpus, teacher, SAE, labels."""
    lines = []
    if corpus := results.get("corpus"):
        packed, documents = corpus["packed"], corpus["documents"]
        counted = ""
        if documents:
            counted = (
                f", {documents['train_documents']:,} training and {documents['validation_documents']:,} validation "
                f"documents, {documents['duplicates_dropped']:,} duplicates dropped"
            )
            if documents["unreadable_files"]:
                counted += f", {documents['unreadable_files']:,} unreadable files or records skipped"
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
        lines.append(
            f"SAE, {sae['d_sae']:,} latents of which {sae['k']} per token: fraction of variance unexplained "
            f"{quality['fraction_variance_unexplained']:.3f}, dead latents {quality['dead_share']:.1%} "
            f"(never active on {quality['tokens']:,} validation tokens), teacher's loss "
            f"{quality['teacher_loss']:.4f} → {quality['spliced_loss']:.4f} with the reconstruction spliced in "
            f"({quality['zero_loss']:.4f} with zeros; {quality['loss_recovered']:.1%} recovered)."
        )
    if labels := results.get("labels"):
        lines.append(
            f"Labels by `{labels['selection']}`, {labels['labels_per_token']} per token: "
            f"{labels['labelled_share']:.1%} of the {'validation' if labels['online'] else 'training'} tokens have at "
            f"least one, {labels['full_share']:.1%} have all; {labels['fewer_positive_share']:.1%} of those with one "
            "have a label whose score is not positive, or fewer than all."
        )
    return lines
