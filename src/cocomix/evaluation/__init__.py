"""What trained models are worth: losses, concept predictions, cost, and the comparison of runs."""
