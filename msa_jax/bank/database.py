"""One TensorStore OCDBT database: zarr3 arrays and keys that change together, or not at all."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from msa_jax.errors import BankError


def url_of(path: str | pathlib.Path) -> str:
    """A kvstore URL that ends in a slash, of a folder or of a URL that TensorStore knows."""
    folder = folder_of(path)
    text = str(path) if folder is None else f"file://{folder.resolve()}"
    return text if text.endswith("/") else text + "/"


def folder_of(path: str | pathlib.Path) -> pathlib.Path | None:
    """The folder of a bank's place, where locks can be held; None of one that is no file system's."""
    text = str(path).removeprefix("file://")
    return None if "://" in text else pathlib.Path(text)


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
        self._base: dict[str, Any] = {"driver": "ocdbt", "base": url}
        if generation is not None:
            self._base["version"] = generation
        self._open()

    def _open(self) -> None:
        self._context = ts.Context()
        self._keys = ts.KvStore.open(self._base, context=self._context).result()

    def read(self, key: str) -> bytes | None:
        result = self._keys.read(key).result()
        return None if result.state == "missing" else bytes(result.value)

    def read_many(self, keys: Sequence[str]) -> list[bytes]:
        """Values of keys, read at once. Raises ValueError when one is missing."""
        results = [pending.result() for pending in [self._keys.read(key) for key in keys]]
        for key, result in zip(keys, results, strict=True):
            if result.state == "missing":
                raise ValueError(f"{key} is missing")
        return [bytes(result.value) for result in results]

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

    def put(self, name: str, values: np.ndarray, start: int, axis: int, transaction: ts.Transaction) -> None:
        """Write `values` from `start` on along `axis`, growing the array when it ends before they do."""
        array = self.array(name, transaction)
        end = start + values.shape[axis]
        if array.shape[axis] < end:
            shape = [*array.shape]
            shape[axis] = end
            array = array.resize(exclusive_max=shape).result()
        place = [slice(None)] * array.rank
        place[axis] = slice(start, end)
        array[tuple(place)].write(values).result()

    def write(self, key: str, value: bytes, transaction: ts.Transaction) -> None:
        self._keys.with_transaction(transaction).write(key, value).result()

    @contextlib.contextmanager
    def commit(self) -> Iterator[ts.Transaction]:
        """A transaction: all that is written under it appears at once when the block ends, nothing if it raises."""
        # Anew, for an array that somebody holds keeps its old shape in the context's cache, and cannot grow then.
        self._open()
        transaction, files = ts.Transaction(atomic=True), self._files()
        before = self.newest() if files else 0
        try:
            yield transaction
            pending = transaction.commit_async()
            try:
                pending.result()
            except KeyboardInterrupt:
                pending.result()  # it cannot be stopped any more: know how it ends
                raise
        except BaseException as e:
            transaction.abort()
            # What was written would stay, of no commit, and keep a full disk full.
            if files and self.newest() == before:
                for file in self._files() - files:
                    file.unlink(missing_ok=True)
                remove_stale_locks(folder_of(self.url))
            if isinstance(e, ValueError | OSError) and not isinstance(e, BankError):
                raise BankError(f"{self.url}: nothing was written, the last version stands: {reason_of(e)}") from e
            raise

    def _files(self) -> set[pathlib.Path]:
        """Files with the data of commits; none where that is no folder."""
        folder = folder_of(self.url)
        return set() if folder is None or not (folder / "d").is_dir() else set((folder / "d").iterdir())

    def newest(self) -> int:
        """Number of the last commit; commits are numbered from 1 on."""
        dump = ts.ocdbt.dump(ts.KvStore.open(self.url).result()).result()
        return dump["versions"][-1]["generation_number"]


def remove_stale_locks(*folders: pathlib.Path, but: str = "") -> None:
    """Delete what a killed writer was writing, save the key `but`; for the one writer, while it writes nothing.

    TensorStore writes a file under the name of its lock and renames that. It does not shorten one that it finds, so
    that the end of a longer one would stay behind the new file's content.
    """
    for folder in folders:
        for file in folder.glob("*.__lock"):
            if file.stem != but:
                file.unlink(missing_ok=True)


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """What TensorStore or the file system raises within the block, as a BankError: `what`, then the reason."""
    try:
        yield
    except BankError:
        raise
    except (ValueError, OSError) as e:
        raise BankError(f"{what}: {reason_of(e)}") from e


def reason_of(error: Exception) -> str:
    """The sentence of a TensorStore error, without its specification and source lines."""
    return str(error).split(" [", 1)[0]
