"""Prompts that tests of several rooms take."""

from functools import partial

from mcore_sft.config import PromptConfig

MATH = {"template": "llama3-instruct", "instruction": "generic/math"}
"""Keys of the prompt that the recipes for mathematics have."""

MathPrompt = partial(PromptConfig, **MATH)
