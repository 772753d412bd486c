"""One trainer for all methods and for teachers."""
