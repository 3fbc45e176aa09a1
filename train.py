"""Trains an MSA model: python train.py --config=configs/demo.py --workdir=runs/demo

Every setting can be changed by flag, as in --config.training.optimizer.learning_rate=0.01. The same command
resumes a run that was interrupted.
"""

from absl import flags
from ml_collections import config_flags

from msa_jax.cli.command import run_command
from msa_jax.runs.build import train_run
from msa_jax.runs.config import RunConfig

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config().", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, tokenizer, logs.")


def main():
    result = train_run(RunConfig.from_dict(_CONFIG.value.to_dict()), _WORKDIR.value)
    shown = {name: round(result.metrics[name], 4) for name in ("loss", "recall@1") if name in result.metrics}
    print({"step": result.step, "finished": result.finished, **shown})


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    run_command(main)
