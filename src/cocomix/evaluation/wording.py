"""What a report says in words about figures: differences, what they mean, where the concepts came from."""

from __future__ import annotations

from typing import Any


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
        tokens = comparison["tokens_to_baseline_loss"]
        if tokens is None:
            sentence += f"; the final loss of `{baseline}` was not reached."
        else:
            sentence += (
                f"; it reaches the final loss of `{baseline}` after {tokens:,.0f} tokens "
                f"({_relative(comparison['tokens_ratio'])} tokens{_of_tokens(comparison)}) and "
                f"{comparison['flops_to_baseline_loss']:.2e} FLOPs of its own training "
                f"({_relative(comparison['flops_ratio'])} FLOPs)."
            )
        sentences.append(sentence)
    return sentences


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


def _of_tokens(comparison: dict[str, Any]) -> str:
    """How sure seeds make of a share of tokens."""
    if (seeds := comparison["tokens_over_seeds"]) is None:
        return ""
    low, high = seeds["interval"]
    return f"; 95 % interval over {seeds['seeds']} seeds {low:+.1%} to {high:+.1%}"


def _relative(ratio: float) -> str:
    return f"{1 - ratio:.1%} fewer" if ratio <= 1 else f"{ratio - 1:.1%} more"


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
    largest = max(student["tokens"] for student in students)
    lines = [
        _of_seeds(results),
        f"Trained on {largest:,} tokens: nothing here says how larger models or longer runs compare.",
    ]
    cost = preparation_flops(results)
    if cost:
        parts = ", ".join(f"{name} {value:.2e}" for name, value in cost.items())
        lines.append(
            f"FLOPs of a student are those of its own training. What the concepts cost before it ({parts} FLOPs) is "
            "spent once; `all` adds to each student an equal part of what it shares with others, and what its "
            "teacher computes while it trains."
        )
    elsewhere = sorted({k for s in students for k, made in s["preparation"].items() if made["flops"] is None})
    if elsewhere:
        lines.append(f"Made elsewhere, at a cost that is not counted: {', '.join(elsewhere)}.")
    if len({student["environment"]["hardware"] for student in students}) > 1:
        lines.append("These runs were trained on different hardware: their times do not compare.")
    return lines


def _of_seeds(results: dict[str, Any]) -> str:
    """What is known of chance in the training."""
    seeds = ", ".join(map(str, sorted({student["seed"] for student in results["students"].values()})))
    once = [name for name, members in results["groups"].items() if len(members) == 1]
    if not once:
        return (
            f"Seeds {seeds}: the deviation from seed to seed says what training again changes, the interval over "
            "validation documents what other validation text would."
        )
    of_whom = (
        f"One seed ({seeds}) per student" if len(once) == len(results["groups"]) else f"One seed of {', '.join(once)}"
    )
    return (
        f"{of_whom}: how much these figures vary from seed to seed was not measured, so a small difference may be "
        "chance; the interval over validation documents does not know of it."
    )


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
    if teacher := results.get("teacher"):
        size = f", {teacher['stored_parameters'] / 1e6:.2f}M parameters" if "stored_parameters" in teacher else ""
        trained = f", trained on {teacher['tokens']:,} tokens" if "tokens" in teacher else f" (`{teacher['source']}`)"
        lines.append(f"Teacher{size}{trained}: validation loss {teacher['metrics']['loss']:.4f}.")
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
