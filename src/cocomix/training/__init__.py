"""One trainer for every method and for teachers."""
