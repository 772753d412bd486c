"""Evaluate trained models: losses, tasks, concept predictions, steering, and the statistics behind the verdicts."""
