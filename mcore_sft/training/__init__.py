"""Packed batches in, a fine-tuned model's checkpoints out."""
