"""Rows in, those worth training on out, and their order: filters, repeats, contamination."""
