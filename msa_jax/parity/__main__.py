"""Command line of `msa_jax.parity`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jax

from msa_jax.parity.inference import check_inference
from msa_jax.parity.recording import Recording
from msa_jax.parity.report import ACTIVATION_TOLERANCE, GRADIENT_TOLERANCE, Report
from msa_jax.parity.training import check_training


def check(path: str) -> Report:
    """Recompute a recorded folder of either kind in float32.

    Raises:
      ValueError: the folder holds no usable recording (`ParityError`, `ConfigError`, `CheckpointError`).
    """
    recording = Recording(path)
    with jax.default_matmul_precision("highest"):
        return check_training(recording) if recording.is_training else check_inference(recording)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each folder; 0 if all pass, 1 above tolerance, 2 if a folder is not usable."""
    parser = argparse.ArgumentParser(
        prog="python -m msa_jax.parity",
        description="Recompute tensors recorded from the published MSA implementation and compare: "
        f"activations to {ACTIVATION_TOLERANCE:g} absolute, gradients to {GRADIENT_TOLERANCE:g} of the "
        "largest entry, selected documents exactly.",
        epilog="Exit status: 0 all within tolerance, 1 something is not, 2 a folder is not usable.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a recorded training step or inference")
    status = 0
    for path in parser.parse_args(arguments).folders:
        try:
            report = check(path)
        except ValueError as e:
            print(e, file=sys.stderr)
            status = 2
        else:
            print(report, flush=True)
            status = max(status, 0 if report.passed else 1)
    return status


if __name__ == "__main__":
    sys.exit(main())
