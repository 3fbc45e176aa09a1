"""One TensorStore OCDBT database: zarr3 arrays and keys that change together, or not at all."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore as ts

from msa_jax.bank.manifest import BankError


def url_of(path: str | pathlib.Path) -> str:
    """A kvstore URL that ends in a slash, of a folder or of a URL that TensorStore knows."""
    text = str(path)
    if "://" not in text:
        text = f"file://{pathlib.Path(text).resolve()}"
    return text if text.endswith("/") else text + "/"


class Database:
    """Reads of one version, and transactions on the newest.

    Everything goes through one TensorStore context: what two contexts write under one transaction would be two
    commits.
    """

    def __init__(self, url: str, *, generation: int | None = None):
        """Open or make the database at `url`.

        Args:
          url: as of `url_of`.
          generation: commit to read; None follows the newest.
        """
        self.url = url
        self._context = ts.Context()
        self._base: dict[str, Any] = {"driver": "ocdbt", "base": url}
        if generation is not None:
            self._base["version"] = generation
        self._keys = ts.KvStore.open(self._base, context=self._context).result()

    def read(self, key: str) -> bytes | None:
        result = self._keys.read(key).result()
        return None if result.state == "missing" else bytes(result.value)

    def read_many(self, keys: list[str]) -> list[bytes]:
        """Values of keys that exist, read at once."""
        return [bytes(pending.result().value) for pending in [self._keys.read(key) for key in keys]]

    def keys(self, prefix: str) -> list[str]:
        """Keys with a prefix, sorted."""
        last = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        return sorted(key.decode() for key in self._keys.list(ts.KvStore.KeyRange(prefix, last)).result())

    def array(self, name: str, transaction: ts.Transaction | None = None) -> ts.TensorStore:
        spec = {"driver": "zarr3", "kvstore": self._base | {"path": f"{name}/"}}
        return ts.open(spec, context=self._context, transaction=transaction).result()

    def create_array(
        self, name: str, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str, transaction: ts.Transaction
    ) -> None:
        """An array of zeros, stored in pieces of `chunk` with a checksum each."""
        spec = {
            "driver": "zarr3",
            "kvstore": self._base | {"path": f"{name}/"},
            "create": True,
            "metadata": {
                "shape": list(shape),
                "data_type": dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            },
        }
        ts.open(spec, context=self._context, transaction=transaction).result()

    def append(self, name: str, values: np.ndarray, axis: int, transaction: ts.Transaction) -> None:
        """Grow an array along `axis` by `values`."""
        array = self.array(name, transaction)
        start = array.shape[axis]
        shape = [*array.shape]
        shape[axis] = start + values.shape[axis]
        array = array.resize(exclusive_max=shape).result()
        place = [slice(None)] * array.rank
        place[axis] = slice(start, shape[axis])
        array[tuple(place)].write(values).result()

    def write(self, key: str, value: bytes, transaction: ts.Transaction) -> None:
        self._keys.with_transaction(transaction).write(key, value).result()

    @contextlib.contextmanager
    def commit(self) -> Iterator[ts.Transaction]:
        """A transaction: all that is written under it appears at once when the block ends, nothing if it raises."""
        transaction = ts.Transaction(atomic=True)
        try:
            yield transaction
            transaction.commit_async().result()
        except BaseException as e:
            transaction.abort()
            if isinstance(e, ValueError | OSError) and not isinstance(e, BankError):
                raise BankError(f"{self.url}: nothing was written, the last version stands: {reason_of(e)}") from e
            raise

    def generations(self) -> list[int]:
        """Numbers of the commits that can be opened."""
        dump = ts.ocdbt.dump(ts.KvStore.open(self.url).result()).result()
        return [version["generation_number"] for version in dump["versions"]]


def reason_of(error: Exception) -> str:
    """The sentence of a TensorStore error, without its specification and source lines."""
    return str(error).split(" [", 1)[0]
