"""Compare finished runs and write reports."""
