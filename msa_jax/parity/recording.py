"""A folder of recorded tensors, and how its padded samples are gathered into packed rows and back."""

from __future__ import annotations

import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from msa_jax.checkpoints.pretrained import load_model
from msa_jax.config import MSAConfig
from msa_jax.errors import DataError
from msa_jax.model import MSATransformer

TEMPLATE = -2


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError as e:
        raise DataError(f"{path}: no such file; a recording has one.") from e
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as e:
        raise DataError(f"{path}: not a readable npz file ({e}).") from e


class Recording:
    """A recording of a training step, of inference or of a backbone.

    Args:
      path: folder with config.json, model.safetensors and io.npz; for training also scalars.json and
        grads.npz.

    Attributes:
      path: the folder.
      msa: the `msa_config` of config.json.

    Raises:
      DataError, ConfigError: config.json or io.npz is missing or unreadable.
    """

    def __init__(self, path: str | os.PathLike, *, implementation: str | None = None):
        self.path = pathlib.Path(path)
        self._implementation = implementation
        if not self.path.is_dir():
            raise DataError(f"{self.path}: no such folder.")
        MSAConfig.from_checkpoint(self.path)  # refuses what is no object of the right fields
        self.msa: dict[str, Any] = json.loads((self.path / "config.json").read_text()).get("msa_config") or {}
        self._arrays = _read_arrays(self.path / "io.npz")

    @property
    def is_training(self) -> bool:
        return "labels" in self._arrays

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def array(self, name: str, *shape: int | None) -> np.ndarray:
        """Recorded array of io.npz; integers become int32.

        Args:
          name: in io.npz.
          *shape: what its shape must be, None for any size; nothing is checked without one.

        Raises:
          DataError: there is none, or it has another shape.
        """
        if name not in self._arrays:
            raise DataError(f"{self.path / 'io.npz'}: lacks {name}, which such a recording has.")
        value = self._arrays[name]
        fits = len(shape) == value.ndim and all(
            n in (None, m) for n, m in zip(shape, value.shape, strict=True)
        )
        if shape and not fits:
            want = ", ".join("any" if n is None else str(n) for n in shape)
            raise DataError(f"{self.path / 'io.npz'}: {name} has shape {value.shape}, must be ({want}).")
        return value.astype(np.int32) if np.issubdtype(value.dtype, np.integer) else value

    def gradients(self) -> dict[str, np.ndarray]:
        return _read_arrays(self.path / "grads.npz")

    def scalars(self) -> dict[str, Any]:
        """The object in scalars.json."""
        path = self.path / "scalars.json"
        try:
            value = json.loads(path.read_text())
        except FileNotFoundError as e:
            raise DataError(f"{path}: no such file; a training recording has one.") from e
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise DataError(f"{path}: not valid JSON ({e}).") from e
        if not isinstance(value, dict):
            raise DataError(f"{path}: must hold an object.")
        return value

    def model(self, **config_changes: Any) -> MSATransformer:
        """The recorded model, computing in float32."""
        settings = dict(dtype="float32", param_dtype="float32", implementation=self._implementation)
        return load_model(self.path, **settings, **config_changes)


def compiled(function: Callable) -> Callable:
    """`jax.jit` with little optimisation: a recording is small and runs once, so compiling takes the time."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)


def pack(places: Sequence[np.ndarray], *, multiple: int = 1) -> np.ndarray:
    """Rows of places [rows, width] int32 in a flat array, -1 for padding at the end of each row.

    Args:
      places: for each row, the places of its tokens.
      multiple: the width is a multiple of this.
    """
    width = -(-max(len(row) for row in places) // multiple) * multiple
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in places]).astype(
        np.int32
    )


def take(flat: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Values of a flat array at `rows` of places, 0 at padding."""
    return np.where(rows >= 0, flat[np.maximum(rows, 0)], 0)


def document_chunks(
    lengths: Sequence[int], row_chunks: int, chunk_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Chunks in use when every document has a row of its own.

    Args:
      lengths: tokens of each document.
      row_chunks: chunks of a row.
      chunk_size: P.

    Returns:
      index of each chunk among those of all rows, and its document, both [chunks in use].
    """
    used = [-(-n // chunk_size) for n in lengths]
    index = np.concatenate([row * row_chunks + np.arange(n) for row, n in enumerate(used)])
    return index, np.repeat(np.arange(len(used)), used)
