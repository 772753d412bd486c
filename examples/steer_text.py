"""Amplify and suppress concepts. After `make quickstart`: python examples/steer_text.py [RUN] [PROMPT]"""

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


def shift(steering) -> str:
    """Return the total variation distance between the next-token distributions, from 0 (equal) to 1 (disjoint)."""
    with torch.no_grad():
        plain, steered = (model(**inputs, steering=each).logits[0, -1].softmax(-1) for each in (None, steering))
    return f"{(plain - steered).abs().sum().item() / 2:.3f}"


# The concepts with the largest and the smallest logit at the end of the prompt.
logits = model(**inputs, output_concepts=True).concept_logits[0, -1]
strong, weak = logits.argmax().item(), logits.argmin().item()

print("plain:\n" + generate())
for name, steering in {
    f"{strong} × 10, as in the paper": Steering.scale({strong: 10.0}),
    f"{strong} suppressed": Steering.suppress([strong]),
    f"{weak} + 30": Steering.add({weak: 30.0}),
}.items():
    print(f"\n{name}; the next-token distribution moves by {shift(steering)}:\n{generate(steering)}")

after_the_prompt = Steering.set({weak: 30.0}, positions="generated") + Steering.suppress([strong])
print(f"\n{weak} set to 30 after the prompt, {strong} suppressed everywhere:\n{generate(after_the_prompt)}")
