"""Evaluates a trained run: python eval.py --config=configs/demo.py --workdir=runs/demo (msa_jax/eval.py)."""

from msa_jax.eval import main

if __name__ == "__main__":
    main()
