"""Steer the concepts with the largest effect. After `make quickstart`: python examples/steer_text.py [RUN] [PROMPT]

The quickstart's model has 0.8M parameters and illustrates the mechanics only: probabilities move, its texts stay poor.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from cocomix import Steering
from cocomix.catalog.search import open_catalog
from cocomix.inspection.effects import candidates, most_probable, next_token_probabilities, rank_effects

STRENGTH = 12.0  # added to a concept's logit; the largest logits of the quickstart's student are 7 to 9

run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart/students/cocomix")
prompt = sys.argv[2] if len(sys.argv) > 2 else "if x is"
model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
catalog = open_catalog(run.parents[1] / "catalog")  # written by `cocomix quickstart`, or `cocomix concepts RUN`
ids = tokenizer(prompt, return_tensors="pt").input_ids[0]


def show(title: str, steering: Steering | None) -> None:
    """Print the five most probable next tokens."""
    (probabilities,) = next_token_probabilities(model, ids, [steering])
    tokens = (f"{token!r} {probability:.1%}" for token, probability in most_probable(tokenizer, probabilities))
    print(f"{title}: {'  '.join(tokens)}")


print(f"The most probable next tokens after {prompt!r}")
show("plain", None)
ranked = rank_effects(model, ids, candidates(catalog, tokenizer), STRENGTH)
for concept, plain, steered in ranked[:3]:
    print(f"\nConcept {concept}, {catalog.names[concept]}: its tokens have {plain:.1%}, and steered {steered:.1%}")
    show(f"+ {STRENGTH:g}", Steering.add({concept: STRENGTH}))

strongest = model(ids[None], output_concepts=True).concept_logits[0, -1].argmax().item()
both = Steering.suppress([strongest]) + Steering.set({ranked[0].concept_id: 15.0})
print(f"\nConcept {strongest}, {catalog.names[strongest]}, is the strongest at the end of the prompt")
show("suppressed", Steering.suppress([strongest]))
show(f"suppressed, and {ranked[0].concept_id} set to 15", both)
