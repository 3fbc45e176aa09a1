"""Checkpoints: those of a run, and folders in a published layout."""

from msa_jax.importing import require_extra

require_extra("bank")
