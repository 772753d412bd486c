"""Text to documents (`sources`, `corpus`), to tokens (`tokenizer`), to blocks (`packing`)."""
