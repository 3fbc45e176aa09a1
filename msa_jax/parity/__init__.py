"""Recompute recorded tensors of the published implementation: `python -m msa_jax.parity DIR...`."""
