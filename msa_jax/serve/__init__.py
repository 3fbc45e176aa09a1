"""Asking a memory bank over HTTP, in the form of OpenAI's chat completions: `python -m msa_jax.serve`."""
