"""A response in, its answer out."""
