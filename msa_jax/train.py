"""Trains an MSA model: python train.py --config=configs/demo.py --workdir=runs/demo

Every setting can be changed by flag, as in --config.training.optimizer.learning_rate=0.01; --print_config lists them.
The same command resumes a run that was interrupted.
"""

from collections.abc import Sequence

from msa_jax.importing import exit_without

exit_without("train", "train")  # before what needs it is imported

from absl import flags

from msa_jax.cli.command import run_command
from msa_jax.errors import require


def _train(values: flags.FlagValues) -> None:
    # Here, because all that trains takes seconds to import.
    from msa_jax.runs.build import train_run
    from msa_jax.runs.config import RunConfig
    from msa_jax.runs.settings import as_text

    run = RunConfig.from_dict(values.config.to_dict())
    if values.print_config:
        print(as_text(run))
        return
    require(values.workdir is not None, "--workdir is missing: name the folder of the run.")
    result = train_run(run, values.workdir)
    shown = {name: round(result.metrics[name], 4) for name in ("loss", "recall@1") if name in result.metrics}
    print({"step": result.step, "finished": result.finished, **shown})


def _define(values: flags.FlagValues) -> None:
    what = "Print all settings, each with its value, its type and what it is, and do nothing else."
    flags.DEFINE_bool("print_config", False, what, flag_values=values)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    run_command(_train, __doc__, _define, arguments, required=("config",))


if __name__ == "__main__":
    main()
