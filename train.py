"""Trains an MSA model: python train.py --config=configs/demo.py --workdir=runs/demo (msa_jax/train.py)."""

from msa_jax.train import main

if __name__ == "__main__":
    main()
