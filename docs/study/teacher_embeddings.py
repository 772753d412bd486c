"""Write an untrained decoder whose token embeddings begin with those of a trained teacher, for `backbone.source`.

A control of recipes/study/early.yaml: does a student gain from features of single tokens alone?

python docs/study/teacher_embeddings.py TEACHER STUDENT OUTPUT --seed 10
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Read the command line and write the model."""
    parser = argparse.ArgumentParser(description="Write an untrained decoder with the token embeddings of a teacher.")
    parser.add_argument("teacher", type=Path, help="folder of the teacher")
    parser.add_argument("student", type=Path, help="folder of a plain decoder that has the sizes and the tokenizer")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of all other weights")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    config = AutoConfig.from_pretrained(options.student)
    model = AutoModelForCausalLM.from_config(config)
    learned = AutoModelForCausalLM.from_pretrained(options.teacher).get_input_embeddings().weight.detach()
    with torch.no_grad():  # the first dimensions, at the scale of an untrained embedding
        weight = model.get_input_embeddings().weight
        weight[:, : learned.shape[1]] = learned * (config.initializer_range / learned.std())
    model.save_pretrained(options.output)
    AutoTokenizer.from_pretrained(options.student).save_pretrained(options.output)


if __name__ == "__main__":
    main()
