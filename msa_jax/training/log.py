"""The log of a run: `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import tensorboardX

from msa_jax.files import write_text


class RunLog:
    """`metrics.jsonl` and TensorBoard of a run. A run that resumes drops what it logged after its checkpoint.

    Args:
      workdir: folder of the run; `metrics.jsonl` and `tensorboard/` are made in it.
      resumed_step: steps already done; later lines are from a run that was cut off, and go.
    """

    def __init__(self, workdir: str | pathlib.Path, *, resumed_step: int = 0):
        self._path = pathlib.Path(workdir) / "metrics.jsonl"
        kept = []
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a killed run
                if record["step"] <= resumed_step:
                    kept.append(line + "\n")
        write_text(self._path, "".join(kept))
        self._file = self._path.open("a")
        self._writer = tensorboardX.SummaryWriter(
            str(pathlib.Path(workdir) / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else None
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._writer.close()
