"""Flags of `train.py` and `eval.py` that start one of several processes."""

from __future__ import annotations

import re

from absl import flags

from msa_jax import distributed
from msa_jax.errors import require

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port at which process 0 can be reached, free there; the same for every process."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "0 to num_processes - 1: this process, with --coordinator.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several processes that JAX finds by itself: TPU slices, SLURM, Open MPI, Kubernetes."
)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 30, "A process that is silent for so long is taken for dead, and the others end."
)
_JOIN = flags.DEFINE_integer("join_seconds", 300, "How long to wait for the other processes at the start.")


def start() -> None:
    """Join the other processes, as the flags say; before JAX is used for anything.

    Raises:
      ConfigError: flags that do not fit together, or the others cannot be reached.
    """
    given = {f.name: f.value for f in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == 3 and not _DISTRIBUTED.value:
        return
    require(
        not missing or (len(missing) == 3 and _DISTRIBUTED.value),
        f"{', '.join(missing)} missing: --coordinator, --num_processes and --process_id go together, or --distributed "
        "alone where JAX can find them out.",
    )
    if not missing:
        require(not _DISTRIBUTED.value, "--distributed finds out what --coordinator and its companions say: give one.")
        require(
            re.fullmatch(r".+:\d{1,5}", _COORDINATOR.value) is not None,
            f"--coordinator must be host:port, got {_COORDINATOR.value!r}.",
        )
        require(
            _NUM_PROCESSES.value >= 1 and 0 <= _PROCESS_ID.value < _NUM_PROCESSES.value,
            f"--process_id must lie in 0 to num_processes - 1, got {_PROCESS_ID.value} of {_NUM_PROCESSES.value}.",
        )
    require(_HEARTBEAT.value >= 1 and _JOIN.value >= 1, "--heartbeat_seconds and --join_seconds must be at least 1.")
    distributed.join(*given.values(), heartbeat_seconds=_HEARTBEAT.value, join_seconds=_JOIN.value)
