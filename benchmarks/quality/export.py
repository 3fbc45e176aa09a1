"""Write the model of a trained run, and its tokenizer, as a checkpoint that another run can start from (`init_from`).

    python -m benchmarks.quality.export --workdir runs/ruler_single --out runs/ruler_single/export
"""

from __future__ import annotations

import argparse
import pathlib

from msa_jax.checkpoints import pretrained
from msa_jax.runs.open import load_model, open_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    run = open_run(options.workdir)
    model, renderer = load_model(run, options.workdir)
    pretrained.save_model(model, options.out)
    renderer.tokenizer.save(options.out)


if __name__ == "__main__":
    main()
