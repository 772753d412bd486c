"""Evaluate trained models: losses, concept predictions, costs, and comparisons of runs."""
