"""Compute the cost of a recipe from sizes, without training anything or loading weights."""
