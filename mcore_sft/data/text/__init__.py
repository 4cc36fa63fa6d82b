"""Rows in, examples out: chat templates, tokenizers, and which tokens are trained."""
