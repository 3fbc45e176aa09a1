"""Command line of `msa_jax.parity`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import jax

from msa_jax.importing import exit_without

exit_without("bank", "parity")  # before what needs it is imported

from msa_jax.parity.backbone import check_backbone
from msa_jax.parity.inference import check_inference
from msa_jax.parity.recording import Recording
from msa_jax.parity.report import ACTIVATION_TOLERANCE, BACKBONE_TOLERANCE, GRADIENT_TOLERANCE, Report
from msa_jax.parity.training import check_training
from pallas_kernels import dispatch


def check(path: str, implementation: str | None = None) -> Report:
    """Recompute a recorded folder of any of the three kinds in float32.

    Args:
      path: the folder.
      implementation: of the operations on the bank, see `pallas_kernels`; interpreted on a machine without it.

    Raises:
      ValueError: the folder holds no usable recording (`DataError`, `ConfigError`, `CheckpointError`).
    """
    recording = Recording(path, implementation=implementation)
    with jax.default_matmul_precision("highest"), dispatch.interpreting(implementation):
        if "generated" in recording:
            return check_backbone(recording)
        return check_training(recording) if recording.is_training else check_inference(recording)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each folder; 0 if all pass, 1 above tolerance, 2 if a folder is not usable."""
    parser = argparse.ArgumentParser(
        prog="python -m msa_jax.parity",
        description="Recompute tensors recorded from the published MSA implementation, or of a backbone from "
        f"transformers, and compare: activations to {ACTIVATION_TOLERANCE:g} absolute, gradients to "
        f"{GRADIENT_TOLERANCE:g} and a backbone to {BACKBONE_TOLERANCE:g} of the largest entry, selected documents "
        "and written tokens exactly.",
        epilog="Exit status: 0 all within tolerance, 1 something is not, 2 a folder is not usable.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a recorded training step, inference or backbone")
    parser.add_argument(
        "--implementation",
        choices=dispatch.IMPLEMENTATIONS,
        help="kernels to recompute with, interpreted where the device is missing; default the best of the platform",
    )
    options = parser.parse_args(arguments)
    if options.implementation == "gpu":
        os.environ.setdefault("NPROC", "16")  # see dispatch.interpreting; JAX has not started yet
    status = 0
    for path in options.folders:
        try:
            report = check(path, options.implementation)
        except ValueError as e:
            print(e, file=sys.stderr)
            status = 2
        else:
            print(report, flush=True)
            status = max(status, 0 if report.passed else 1)
    return status


if __name__ == "__main__":
    sys.exit(main())
