"""Look into a model's concepts and change them: traces, names, and how both are shown."""
