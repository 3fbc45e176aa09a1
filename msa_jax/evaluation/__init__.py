"""Evaluation: a memory of a given size, questions to it, and the scores of the answers."""

from msa_jax.evaluation.evaluate import evaluate, write_results

__all__ = ["evaluate", "write_results"]
