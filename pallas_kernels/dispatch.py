"""Which implementation an operation runs: chosen by name it never falls back."""

from __future__ import annotations

IMPLEMENTATIONS = ("xla", "tpu", "gpu")


def resolve(op: str, implementation: str | None, available: tuple[str, ...]) -> str:
    """Name of the implementation to run.

    Args:
      op: name of the operation, for messages.
      implementation: a name, or None for the best that `available` holds.
      available: implementations of this operation, best last.

    Raises:
      ValueError: a name nobody knows.
      NotImplementedError: a known name that this operation does not have.
    """
    if implementation is None:
        return available[-1]
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}.")
    if implementation not in available:
        raise NotImplementedError(
            f"{op}: no {implementation!r} kernel exists; available: {available}, or None for the best of them."
        )
    return implementation
