"""Rows -> conversations -> examples -> packs -> batches."""
