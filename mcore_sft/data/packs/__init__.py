"""Examples in, a packed dataset out, and from it the batches of a step."""
