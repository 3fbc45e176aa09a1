"""Trains an MSA model: python train.py --config=configs/demo.py --workdir=runs/demo

Every setting can be changed by flag, as in --config.training.optimizer.learning_rate=0.01. The same command
resumes a run that was interrupted.
"""

from collections.abc import Sequence

from msa_jax.cli.command import run_command


def _train(flags) -> None:
    # Here, because all that trains takes seconds to import.
    from msa_jax.runs.build import train_run
    from msa_jax.runs.config import RunConfig

    result = train_run(RunConfig.from_dict(flags.config.to_dict()), flags.workdir)
    shown = {name: round(result.metrics[name], 4) for name in ("loss", "recall@1") if name in result.metrics}
    print({"step": result.step, "finished": result.finished, **shown})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    run_command(_train, __doc__, arguments=arguments)


if __name__ == "__main__":
    main()
