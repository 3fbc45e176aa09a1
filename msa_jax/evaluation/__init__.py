"""Evaluation: a task asks a trained run, and its answers become rows of scores (`evaluate.evaluate`)."""
