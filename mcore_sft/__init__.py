"""Full fine-tuning of Llama-family models with Megatron-core."""

__version__ = "0.1.0"
