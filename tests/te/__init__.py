"""Transformer Engine's own Python on the CPU, over an extension that this package computes.

fetch.py brings the Python, which holds nothing compiled. plugin.py, which `make test-te` gives to
pytest, imports it over `transformer_engine_torch` as extension.py makes it: each kernel that
training calls, in plain torch, with an assertion for each thing that the real kernel demands.
`CALLS` tells tests what ran.
"""
