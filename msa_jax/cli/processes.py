"""Flags of `train.py` and `eval.py` that start one of several processes."""

from __future__ import annotations

import re

from absl import flags

from msa_jax import distributed
from msa_jax.errors import require


def define_flags(values: flags.FlagValues) -> None:
    """Add the flags that `start` reads."""
    address = "host:port at which process 0 can be reached, free there; the same for every process."
    flags.DEFINE_string("coordinator", None, address, flag_values=values)
    whole = lambda name, default, what: flags.DEFINE_integer(name, default, what, flag_values=values)  # noqa: E731
    whole("num_processes", None, "How many processes there are, with --coordinator.")
    whole("process_id", None, "0 to num_processes - 1: this process, with --coordinator.")
    whole("heartbeat_seconds", 30, "A process that is silent for so long is taken for dead, and the others end.")
    whole("join_seconds", 300, "How long to wait for the other processes at the start.")
    flags.DEFINE_bool(
        "distributed", False, "Several processes that JAX finds by itself: TPU slices, SLURM, Open MPI, Kubernetes.",
        flag_values=values,
    )  # fmt: skip


def start(values: flags.FlagValues) -> None:
    """Join the other processes, as the flags say; before JAX is used for anything.

    Raises:
      ConfigError: flags that do not fit together, or the others cannot be reached.
    """
    given = {name: values[name].value for name in ("coordinator", "num_processes", "process_id")}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == 3 and not values.distributed:
        return
    require(
        not missing or (len(missing) == 3 and values.distributed),
        f"{', '.join(missing)} missing: --coordinator, --num_processes and --process_id go together, or --distributed "
        "alone where JAX can find them out.",
    )
    if not missing:
        require(not values.distributed, "--distributed finds out what --coordinator and its companions say: give one.")
        require(
            re.fullmatch(r".+:\d{1,5}", values.coordinator) is not None,
            f"--coordinator must be host:port, got {values.coordinator!r}.",
        )
        require(
            values.num_processes >= 1 and 0 <= values.process_id < values.num_processes,
            f"--process_id must lie in 0 to num_processes - 1, got {values.process_id} of {values.num_processes}.",
        )
    for name in ("heartbeat_seconds", "join_seconds"):
        require(values[name].value >= 1, f"--{name} must be at least 1, got {values[name].value}.")
    distributed.join(*given.values(), heartbeat_seconds=values.heartbeat_seconds, join_seconds=values.join_seconds)
