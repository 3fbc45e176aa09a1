"""What fits where: a model's programs over a bank of any size, compiled for TPUs that need not be here, and by
arithmetic for GPUs. `python -m msa_jax.plan --help`."""
