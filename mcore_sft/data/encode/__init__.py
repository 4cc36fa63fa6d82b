"""Blocks of rows in, files of examples out: what worker processes make, kept until it is packed."""
