"""Convergence benchmarks, their judgement and their history; training runs as its users run it."""
