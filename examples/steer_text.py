"""Raise and suppress what a model thinks of. After `make quickstart`: python examples/steer_text.py [RUN] [PROMPT]"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cocomix import Steering

run = sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart/students/cocomix"
prompt = sys.argv[2] if len(sys.argv) > 2 else "def read_file(path):"
model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
inputs = tokenizer(prompt, return_tensors="pt")


def generate(steering=None) -> str:
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False, steering=steering)
    return tokenizer.decode(ids[0])


def apart(steering) -> str:
    """How far the next token's distribution moves, half the sum of absolute differences: 0 not at all, 1 all of it."""
    with torch.no_grad():
        plain, steered = (model(**inputs, steering=each).logits[0, -1].softmax(-1) for each in (None, steering))
    return f"{(plain - steered).abs().sum().item() / 2:.3f}"


# The concept that the model predicts most strongly at the end of the prompt, and one that it does not think of at all.
logits = model(**inputs, output_concepts=True).concept_logits[0, -1]
strong, absent = logits.argmax().item(), logits.argmin().item()

print("plain:\n" + generate())
for wish, steering in {
    f"{strong} · 10, as the paper steers": Steering.scale({strong: 10.0}),
    f"{strong} suppressed": Steering.suppress([strong]),
    f"{absent} + 30, which lets it in": Steering.add({absent: 30.0}),
}.items():
    print(f"\n{wish}; the next token's distribution moves by {apart(steering)}:\n{generate(steering)}")

after_the_prompt = Steering.set({absent: 30.0}, positions="generated") + Steering.suppress([strong])
print(f"\n{absent} set to 30 after the prompt, {strong} suppressed everywhere:\n{generate(after_the_prompt)}")

with model.steered({strong: 30.0}):  # everything that this thread does with the model
    print(f"\nall that is done here, {strong} + 30:\n{generate()}")
