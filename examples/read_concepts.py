"""Trace the concepts of a text. After `make quickstart`: python examples/read_concepts.py [RUN] [TEXT]"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import cocomix
from cocomix.catalog.search import open_catalog

run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart/students/cocomix")
text = sys.argv[2] if len(sys.argv) > 2 else "def read_file(path):"
model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
catalog = run.parents[1] / "catalog"  # written by `cocomix concepts RUN`; without it, concepts have no names
names = open_catalog(catalog).names if catalog.is_dir() else None

trace = cocomix.trace(model, tokenizer, text, names=names)
for token in trace.tokens:
    strongest = max(token.concepts[:4], key=lambda concept: abs(concept.ablation_effect))
    print(
        f"{token.text!r} → {token.next_text!r}: concept {strongest.concept_id} ({strongest.name}) has "
        f"{strongest.share:.0%} of the continuous vector and adds {strongest.ablation_effect:+.3f} nats to log p"
    )

print(f"\nThe parts sum to the continuous vectors within {trace.verify():.0e}.")
print(f"Correlation of gradient and ablation effects: {trace.comparison.correlation:.3f}")
print(f"Shape of the concepts' contributions to the vector of the last token: {tuple(trace.mixture.parts(-1).shape)}")
