"""From text to documents (`sources`, `corpus`), tokens (`tokenizer`), and blocks (`packing`)."""
