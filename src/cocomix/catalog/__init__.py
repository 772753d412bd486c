"""The concept catalog: contexts, promoted tokens, frequencies, names, and search."""
