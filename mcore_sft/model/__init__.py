"""A Hugging Face configuration in, the Megatron-core model of this rank out."""
