"""Write a trained model and its tokenizer in the published layout, which `init_from` and `--checkpoint` take.

    python -m msa_jax.export --workdir runs/demo --out runs/demo_export
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from msa_jax.importing import exit_without

exit_without("bank", "export")  # before what needs it is imported

from msa_jax.checkpoints import pretrained
from msa_jax.cli.base import run
from msa_jax.data import Tokenizer
from msa_jax.errors import ConfigError
from msa_jax.model import MSATransformer
from msa_jax.runs.open import load_model, open_run


def require_new(out: pathlib.Path) -> None:
    """Raises ConfigError when there is something in the way."""
    if out.exists():
        raise ConfigError(f"{out} exists; remove it or give another folder.")


def export(model: MSATransformer, tokenizer: Tokenizer, out: pathlib.Path) -> None:
    """Write parameters, config.json, tokenizer and template into the folder `out`. Raises ConfigError: it exists."""
    require_new(out)
    pretrained.save_model(model, out)
    tokenizer.save(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when it was written, 1 after a sentence that says why not."""
    parser = argparse.ArgumentParser(
        prog="python -m msa_jax.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, metavar="RUN", help="of the trained run")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="a new folder")
    options = parser.parse_args(arguments)

    def work() -> None:
        require_new(options.out)
        model, renderer = load_model(open_run(options.workdir), options.workdir)
        export(model, renderer.tokenizer, options.out)
        print(options.out)

    return run("export", work)


if __name__ == "__main__":
    sys.exit(main())
