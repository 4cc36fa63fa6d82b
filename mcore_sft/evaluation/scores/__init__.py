"""Verdicts in, scores and their reports out."""
