"""Prompts in, completions out: transformers, vLLM, a server."""
