"""Search for concepts. After `make quickstart`: python examples/find_concepts.py [RUN] [WORDS]"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from cocomix.catalog.search import open_catalog
from cocomix.concepts.label_store import load_labels
from cocomix.evaluation.concepts import concept_predictions
from cocomix.evaluation.prediction import label_tables, training_frequencies

run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart/students/cocomix")
words = sys.argv[2] if len(sys.argv) > 2 else "import"
catalog = open_catalog(run.parents[1] / "catalog")
model = AutoModelForCausalLM.from_pretrained(run).eval()

# Count the correct predictions of every concept on some validation blocks.
labeled = load_labels(run.parents[1] / "labels")
blocks = labeled.validation.select(range(min(32, len(labeled.validation))))
tables = label_tables(labeled, model)
counts = concept_predictions(model, blocks, training_frequencies(labeled), tables, batch_size=8)

for hit in catalog.search(words, limit=3):
    concept = catalog.concept(hit.concept_id)
    print(f"{concept.concept_id} ({concept.name}), active at {concept.frequency:.2%} of tokens")
    print(f"  promotes the teacher's tokens {concept.promoted[:4]}, suppresses {concept.suppressed[:4]}")
    for context in concept.contexts[:3]:
        print(f"  {context.activation:.2f}  {context.before!r} → {context.token!r} ← {context.after!r}")
    labels, found = counts.labels[concept.concept_id], counts.model.at_a[concept.concept_id]
    print(f"  the model predicts {found} of its {labels} labels on {counts.tokens} tokens\n")
