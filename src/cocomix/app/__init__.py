"""The page: generate, read and look up concepts in a browser."""
