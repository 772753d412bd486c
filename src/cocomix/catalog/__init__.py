"""What each concept stands for: contexts, promoted tokens, frequencies, names, and how to find one."""
