"""Raise and suppress what a model thinks of. After `make quickstart`: python examples/steer_text.py [RUN] [PROMPT]"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from cocomix import Steering

run = sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart/students/cocomix"
prompt = sys.argv[2] if len(sys.argv) > 2 else "def read_file(path):"
model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
inputs = tokenizer(prompt, return_tensors="pt")


def generate(steering=None) -> str:
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False, steering=steering)
    return tokenizer.decode(ids[0])


# The concept that the model predicts most strongly at the end of the prompt, and one that it does not think of at all.
logits = model(**inputs, output_concepts=True).concept_logits[0, -1]
strong, absent = logits.argmax().item(), logits.argmin().item()

print("plain:\n" + generate())
print(f"\n{strong} · 10, as the paper steers:\n" + generate(Steering.scale({strong: 10.0})))
print(f"\n{absent} + 30, which lets it in:\n" + generate({absent: 30.0}))
both = Steering.set({absent: 30.0}, positions="generated") + Steering.suppress([strong])
print(f"\n{absent} set to 30 after the prompt, {strong} suppressed everywhere:\n" + generate(both))

with model.steered({absent: 30.0}):  # everything that this thread does with the model
    print(f"\nthe same as + 30:\n{generate()}")
