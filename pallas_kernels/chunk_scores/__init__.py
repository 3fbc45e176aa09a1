"""Scores of memory chunks: one matrix product with a max over routing tokens."""
