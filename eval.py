"""Evaluates a trained run: python eval.py --config=configs/demo.py --workdir=runs/demo --memory_tokens=16384,65536

For every size it encodes a memory of held-out text, asks its questions, lets the model generate freely, and
reports a table, eval.json and curve.png in the workdir.
"""

from absl import flags
from ml_collections import config_flags

from msa_jax import distributed
from msa_jax.cli.command import run_command
from msa_jax.errors import ConfigError
from msa_jax.evaluation import evaluate, write_results
from msa_jax.runs.config import RunConfig

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config().", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
_MEMORY_TOKENS = flags.DEFINE_list("memory_tokens", ["16384"], "Sizes of memory, in tokens.")


def _sizes(values: list[str]) -> list[int]:
    try:
        sizes = [int(v.replace("_", "")) for v in values]
    except ValueError:
        raise ConfigError(f"--memory_tokens must be integers, got {','.join(values)}.") from None
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--memory_tokens must name sizes of at least 1, got {','.join(values)}.")
    return sizes


def main():
    run = RunConfig.from_dict(_CONFIG.value.to_dict())
    rows = evaluate(run, _WORKDIR.value, _sizes(_MEMORY_TOKENS.value))
    if not distributed.is_main():
        return
    text = write_results(rows, run, _WORKDIR.value)
    print(f"\n{text}\n\n{_WORKDIR.value}/eval.json\n{_WORKDIR.value}/curve.png")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    run_command(main)
