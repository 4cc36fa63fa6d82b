"""A right answer and a response in, a verdict out; without torch."""
