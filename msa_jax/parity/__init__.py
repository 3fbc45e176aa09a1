"""Recompute recorded tensors of the published implementation: `python -m msa_jax.parity DIR...`."""

from msa_jax.parity.recording import Recording
from msa_jax.parity.report import Report

__all__ = ["Recording", "Report"]
