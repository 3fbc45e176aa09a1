"""Errors of recomputed tensors against recorded ones, and the table that shows them."""

from __future__ import annotations

import dataclasses

import numpy as np

# Agreement to expect in float32: of activations, losses and scores, absolutely,
ACTIVATION_TOLERANCE = 2e-5
# and of gradients, relatively to the largest entry of the tensor.
GRADIENT_TOLERANCE = 1e-4
# of a backbone's hidden states and logits, relatively too.
BACKBONE_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Row:
    """One compared tensor: largest errors, or a note on why none can be given."""

    name: str
    passed: bool
    absolute: float = 0.0
    relative: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        errors = "" if self.note else f"abs {self.absolute:.2e}  rel {self.relative:.2e}"
        return f"  {'ok  ' if self.passed else 'FAIL'}  {errors:<30}  {self.name}  {self.note}".rstrip()


class Report:
    """What was compared in one folder.

    Attributes:
      title: the folder and its kind.
      rows: one for each compared tensor, in order.
    """

    def __init__(self, title: str):
        self.title = title
        self.rows: list[Row] = []

    @property
    def passed(self) -> bool:
        """All rows passed, and there is one."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def fail(self, name: str, note: str) -> None:
        self.rows.append(Row(name, False, note=note))

    def note(self, name: str, note: str) -> None:
        """A tensor that counts as passed without numbers to compare."""
        self.rows.append(Row(name, True, note=note))

    def _errors(self, ours, recorded, valid):
        ours, recorded = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
        if valid is not None:
            ours, recorded = ours[valid], recorded[valid]
        if not ours.size:
            return 0.0, 0.0, 0.0
        absolute, largest = float(np.abs(ours - recorded).max()), float(np.abs(recorded).max())
        return absolute, absolute / largest if largest else float(absolute > 0), largest

    def _fits(self, name, ours, recorded) -> bool:
        if np.shape(ours) != np.shape(recorded):
            self.fail(name, f"recorded shape {np.shape(recorded)}, computed {np.shape(ours)}")
            return False
        return True

    def activation(self, name: str, ours, recorded, *, valid: np.ndarray | None = None) -> None:
        """Compare by absolute error; NaN fails.

        Args:
          name: shown.
          ours, recorded: of one shape.
          valid: bool over the leading axes, entries that mean something; default all.
        """
        if self._fits(name, ours, recorded):
            absolute, relative, _ = self._errors(ours, recorded, valid)
            self.rows.append(Row(name, absolute <= ACTIVATION_TOLERANCE, absolute, relative))

    def relative(self, name: str, ours, recorded, *, tolerance: float, floor: float = 1e-30) -> None:
        """Compare by error relative to the tensor's largest entry; NaN fails.

        Args:
          name: shown.
          ours, recorded: of one shape.
          tolerance: the most that the error may be.
          floor: a largest entry below this counts as this: such a gradient is rounding of larger ones.
        """
        if self._fits(name, ours, recorded):
            absolute, _, largest = self._errors(ours, recorded, None)
            relative = absolute / max(largest, floor)
            self.rows.append(Row(name, relative <= tolerance, absolute, relative))

    def equal(self, name: str, ours, recorded) -> None:
        """Compare integers, which must be equal."""
        if self._fits(name, ours, recorded):
            wrong = int(np.sum(np.asarray(ours) != np.asarray(recorded)))
            total = np.size(recorded)
            self.rows.append(
                Row(name, not wrong, note=f"{wrong} of {total} differ" if wrong else f"{total} equal")
            )

    def __str__(self) -> str:
        bad = [row.name for row in self.rows if not row.passed]
        worst = max((row.absolute for row in self.rows), default=0.0)
        verdict = (
            f"FAILED: {', '.join(bad)}" if bad else "passed" if self.rows else "FAILED: nothing to compare"
        )
        lines = [self.title, *map(str, self.rows)]
        return "\n".join(
            [*lines, f"  {len(self.rows)} compared, largest absolute error {worst:.2e}: {verdict}"]
        )
