"""Attention over chunk ranges of a memory bank and own tokens, in one softmax."""
