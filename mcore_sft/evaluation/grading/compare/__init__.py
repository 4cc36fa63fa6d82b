"""Two answers in, whether they are the same out, by kind."""
