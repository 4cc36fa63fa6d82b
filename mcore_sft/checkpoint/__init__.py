"""What is kept on disk: Hugging Face weights in and out, and distributed checkpoints."""
