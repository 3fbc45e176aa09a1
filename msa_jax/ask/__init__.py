"""Asking the memory from the command line: `python -m msa_jax.ask`."""
