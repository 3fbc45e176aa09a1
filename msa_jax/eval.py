"""Evaluates a trained run: python eval.py --config=configs/demo.py --workdir=runs/demo --memory_tokens=16384,65536

For every size it encodes a memory of held-out text, asks its questions, lets the model generate freely, and
reports a table, eval.json and curve.png in the workdir.

How documents are found (--config.evaluation.mode=NAME):
"""

from collections.abc import Sequence

from msa_jax.importing import exit_without

exit_without("train", "eval")  # before what needs it is imported

from absl import flags

from msa_jax import distributed
from msa_jax.cli.command import run_command
from msa_jax.errors import ConfigError


def _sizes(values: list[str]) -> list[int]:
    try:
        sizes = [int(v.replace("_", "")) for v in values]
    except ValueError:
        raise ConfigError(f"--memory_tokens must be integers, got {','.join(values)}.") from None
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--memory_tokens must name sizes of at least 1, got {','.join(values)}.")
    return sizes


def _evaluate(values: flags.FlagValues) -> None:
    # Here, because all that evaluates takes seconds to import.
    from msa_jax.evaluation import evaluate, write_results
    from msa_jax.runs.config import RunConfig

    run = RunConfig.from_dict(values.config.to_dict())
    rows = evaluate(run, values.workdir, _sizes(values.memory_tokens))
    if not distributed.is_main():
        return
    text = write_results(rows, run, values.workdir)
    print(f"\n{text}\n\n{values.workdir}/eval.json\n{values.workdir}/curve.png")


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_list("memory_tokens", ["16384"], "Sizes of memory, in tokens.", flag_values=values)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    from msa_jax.inference.settings import modes_help

    run_command(_evaluate, f"{__doc__}{modes_help()}\n", _define, arguments)


if __name__ == "__main__":
    main()
