"""Checkpoints: those of a run, and folders in a published layout."""
