"""The models.

`causal_lm.py` and its imports need only torch and transformers. Saved models carry copies of these files, so that they
load with `trust_remote_code=True` where `cocomix` is not installed.
"""
