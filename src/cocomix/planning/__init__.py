"""What a recipe will cost, computed from sizes: nothing is trained, and no weights are loaded or held."""
