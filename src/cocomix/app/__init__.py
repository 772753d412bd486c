"""The web page: generate text, read a text, and look up concepts."""
