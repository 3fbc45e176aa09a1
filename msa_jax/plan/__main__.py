"""What fits where: `python -m msa_jax.plan --tokens 100M --topology v5e-16`.

The question step, the decode step, the document encoder and the training step of a model, compiled ahead of time for
TPUs that need not be here (needs libtpu, `make tpu`), and by arithmetic for GPUs. For questions the first layout of the
bank that fits is taken: bfloat16 on the device, int8 content, int8 keys too, content in host memory, content on disk.
Exit status: 0 everything fits, 1 refused with one sentence, 3 something does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import jax

from msa_jax.importing import exit_without

exit_without("bank", "msa_jax.plan")  # before what needs it is imported

from msa_jax.cli.base import run
from msa_jax.errors import ConfigError
from msa_jax.plan import choose, report, settings
from msa_jax.plan.topologies import Topology

_SIZES = {
    "batch": "questions at once",
    "question_tokens": "tokens of a question",
    "cache_tokens": "slots of a decoder's cache",
    "document_tokens": "tokens of a document, on average",
    "longest_tokens": "tokens of the bank's longest document",
    "row_tokens": "tokens of a row that is encoded",
    "train_row_tokens": "tokens of a row in training",
    "train_batch": "questions of a training batch",
    "train_question_tokens": "tokens of each, with its reply",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ConfigError(f"{message} (--help lists flags).")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m msa_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = settings.Sizes()
    parser.add_argument("--model", default="qwen3_4b", help="a preset or a checkpoint's folder (%(default)s)")
    parser.add_argument("--tokens", default="100M", help="of the bank, such as 100M or 64Ki (%(default)s)")
    parser.add_argument("--topology", default="v5e-16", help="v5e-16, v5p-16, v6e-16, 8xh100, ... (%(default)s)")
    parser.add_argument("--keys", help="dtype of routing keys, bfloat16 or int8; default the first that fits")
    parser.add_argument(
        "--content", help="bfloat16, int8, device, host, disk, or int8,host; default the first that fits"
    )
    parser.add_argument("--mesh", help="such as data=1,memory=4,model=4, of every program asked for")
    parser.add_argument("--programs", default=",".join(settings.PROGRAMS), help="any of %(default)s")
    parser.add_argument("--train_tokens", default="64Ki", help="memory of a training batch (%(default)s)")
    parser.add_argument("--rows", type=int, help="rows a chip encodes at once; default as many as fit, at most 8")
    for name, what in _SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name), help=f"{what} (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _run(options: argparse.Namespace) -> int:
    names = [name.strip() for name in options.programs.split(",")]
    if unknown := [name for name in names if name not in settings.PROGRAMS]:
        raise ConfigError(f"--programs {unknown[0]!r}: choose from {', '.join(settings.PROGRAMS)}.")
    topology = Topology.parse(options.topology)
    sizes = settings.Sizes(
        tokens=settings.parse_tokens(options.tokens),
        train_tokens=settings.parse_tokens(options.train_tokens, "--train_tokens"),
        rows=options.rows,
        **{name: getattr(options, name) for name in _SIZES},
    )
    mesh = None if options.mesh is None else settings.parse_mesh(options.mesh, topology.chips)
    banks = settings.parse_banks(options.keys, options.content)
    config = settings.load_config(options.model)
    tell = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    rows = choose.plan(config, topology, sizes, names, banks, mesh, tell)
    print(json.dumps(report.as_json(topology, rows), indent=1) if options.json else report.table(topology, rows))
    return 0 if all(row.fits for row in rows) else 3


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags and print the plan; returns the exit status."""
    # Nothing runs, so no accelerator of this host is taken.
    jax.config.update("jax_platforms", "cpu")
    return run("msa_jax.plan", lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
