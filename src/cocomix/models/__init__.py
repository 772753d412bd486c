"""The model. `causal_lm.py` and what it imports need only torch and transformers: saved models carry them along."""
