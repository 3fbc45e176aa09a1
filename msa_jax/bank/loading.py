"""From a bank on disk to the device: the chunks of live documents, straight into (sharded) arrays that can grow."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import jax
import numpy as np

from msa_jax.bank import transfer
from msa_jax.bank.arrays import HOST, empty, fields_of, resize
from msa_jax.bank.disk_content import DiskContent
from msa_jax.bank.manifest import BankSpec
from msa_jax.bank.placement import Placement
from msa_jax.bank.reader import BankReader
from msa_jax.errors import BankError
from msa_jax.memory import DocumentLayout, MemoryBank, tiers
from msa_jax.sharding import Shardings, put

_LOG = logging.getLogger(__name__)
_INFERENCE = Shardings.inference()


@dataclasses.dataclass(eq=False)
class LoadedBank:
    """A bank on the device, and which documents of the store its documents are. A value: nothing in it changes.

    Attributes:
      bank: C and N padded to capacities; padding is of no document.
      placement: which document and chunk of the store stands where.
      spec: of the store.
      reader: of content that stays on disk: at the version of the bank, whatever becomes of the store.
    """

    bank: MemoryBank
    placement: Placement
    spec: BankSpec
    reader: BankReader | None = None

    @property
    def version(self) -> int:
        """Of the store."""
        return self.placement.version

    @property
    def rows(self) -> np.ndarray:
        """[N] int64: row in the store's table of each document, -1 where there is none.

        Documents of equal text in one namespace are one document here.
        """
        return self.placement.rows

    @property
    def namespaces(self) -> np.ndarray:
        """[N] int64: number of each document's namespace, -1 where there is no document."""
        return self.placement.namespaces

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the namespaces."""
        return self.placement.names

    def visible(self, questions: Sequence[Sequence[str] | None]) -> np.ndarray:
        """[B, N] bool: documents that each question may see, by the namespaces it names; None names all.

        Raises:
          BankError: a name that no document has.
        """
        masks = []
        for names in questions:
            unknown = set(names or ()) - set(self.names)
            if unknown:
                raise BankError(f"no namespace {sorted(unknown)[0]!r} in this bank: it has {', '.join(self.names)}.")
            numbers = range(len(self.names)) if names is None else [self.names.index(name) for name in names]
            masks.append(np.isin(self.namespaces, list(numbers)))
        return np.stack(masks)

    def refresh(self, store: BankReader, *, progress: bool = False) -> LoadedBank:
        """The bank at the version of `store`, a reader of another version or a writer that went on.

        What is new is read and written behind the rest, in place, on the devices with most room: nothing else is
        read or moved, and no shape changes, so nothing is compiled anew for questions unless a document is longer
        than all before. Deleted documents keep their place as nobody's. All is loaded anew, with room to grow, when
        what is new does not fit behind the rest or the store was compacted or is another bank of the model; a line
        of the log says so.

        Use what is returned from then on, and nothing of this one: its arrays are donated. When reading fails, this
        one stands as it was, unless all was being loaded anew: then `load` again.

        Args:
          store: an open bank of the same model; in several processes, at the same version in all.
          progress: show a progress bar of bytes read.

        Raises:
          BankError: another model's bank, or one that cannot be read.
        """
        store.spec.require_same(self.spec, str(store.path))
        before, after = self.placement, self.placement.follow(store)
        if after is before:
            return self
        arrays = {name: array for name, array in self.bank.arrays.items() if array is not None}
        fields = fields_of(arrays)
        if after is None:
            after = before.anew(store)
            room = after.source.size
            _LOG.info("%s: version %d is loaded anew, into room for %d chunks", store.path, after.version, room)
            if room != before.source.size:
                resize(arrays, room)
            transfer.write(store, fields, arrays, after.source, after.filled(), progress=progress)
        else:
            try:
                transfer.write(store, fields, arrays, after.source, after.filled(before), progress=progress)
            finally:
                self.bank = self.bank.replace(**arrays)
        after = _loaded(store, arrays, after, self.bank.layout.starts.sharding, self.bank.layout.axes)
        self.close()
        return after

    def close(self) -> None:
        """Let `compact` delete what content on disk was read from. `refresh` does it for the bank it takes over."""
        if self.reader is not None:
            self.reader.close()


def load(
    store: BankReader,
    *,
    namespaces: Sequence[str] | None = None,
    rows: np.ndarray | None = None,
    room: float = 0.0,
    content: str = "device",
    key_dtype: str | None = None,
    content_dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Shardings = _INFERENCE,
    progress: bool = False,
) -> LoadedBank:
    """Load live documents onto the device, or spread over those of a mesh.

    Every device's part is read from disk for itself, piece by piece: the host holds some pieces at a time, and a
    process reads what its own devices hold. Parts are equal in size, so that the fullest one sets C; a document is
    whole in one part.

    Args:
      store: an open bank; in several processes, at the same version in all.
      namespaces: which ones; default all.
      rows: [n] int64, documents by their rows in `store.table`; default all. `refresh` then brings no others.
      room: capacity beyond what is needed, as part of it, for `refresh` to grow into. Capacities are padded to a few
        sizes anyhow, by up to a quarter.
      content: where content goes: "device"; "host", into its pinned memory; or "disk", where it stays, and where
        what a question selected is read from.
      key_dtype, content_dtype: "int8" quantises routing keys or content while they are read; default as stored.
      mesh: use the bank under `jax.set_mesh` of it. Default: all goes to the first device.
      shardings: `bank` names the axes of the mesh over which documents are spread; what other axes tell apart holds
        the same. With None every device holds all.
      progress: show a progress bar of bytes read.

    Raises:
      BankError: no such namespace, tier, dtype or axis, or a bank that cannot be read.
      ValueError: content off the device for a bank of which every device holds all.
    """
    if content not in ("device", "host", "disk"):
        raise BankError(f"load: content goes to 'device', 'host' or 'disk', not to {content!r}.")
    if content == "disk" and content_dtype is not None:
        raise BankError("load: content on disk is read as it is stored: leave content_dtype out.")
    spec, names = store.spec, store.table.namespaces
    unknown = [name for name in namespaces or () if name not in names]
    if unknown:
        raise BankError(f"{store.path}: no namespace {unknown[0]!r}: it has {', '.join(names)}.")
    axes = None if mesh is None else shardings.bank
    sharding, layout_sharding = _shardings(mesh, axes)
    if axes is None:
        tiers.require_one_device(sharding, content)
    parts = math.prod(mesh.shape[axis] for axis in axes or ())
    among = None if rows is None else np.unique(rows)
    placement = Placement.of(store, only=namespaces, among=among, room=room, parts=parts)
    dtypes = dict(routing_keys=key_dtype, content_k=content_dtype, content_v=content_dtype)
    places = dict(routing_keys=sharding)
    if content != "disk":
        place = sharding.with_memory_kind(HOST) if content == "host" else sharding
        places |= dict(content_k=place, content_v=place)
    arrays = empty(spec, placement.source.size, dtypes, places)
    transfer.write(store, fields_of(arrays), arrays, placement.source, placement.filled(), progress=progress)
    return _loaded(store, arrays, placement, layout_sharding, axes)


def _shardings(mesh: jax.sharding.Mesh | None, axes: tuple[str, ...] | None):
    """Of arrays [L_r, C, ...], and of the layout's [C] and [N].

    Raises:
      BankError: the mesh has no such axis.
    """
    if mesh is None:
        return (jax.sharding.SingleDeviceSharding(jax.local_devices()[0]),) * 2
    missing = [axis for axis in axes or () if axis not in mesh.axis_names]
    if missing:
        raise BankError(
            f"load: the mesh has the axes {', '.join(mesh.axis_names)} and no {missing[0]!r}, over which "
            "shardings.bank spreads documents: make it with MeshConfig, or name axes it has."
        )
    return tuple(jax.sharding.NamedSharding(mesh, jax.P(*lead, axes or None)) for lead in ((None,), ()))


def _loaded(store, arrays, placement, layout_sharding, axes) -> LoadedBank:
    parts = {name: getattr(placement, name) for name in ("chunk_documents", "starts", "lengths")}
    layout = DocumentLayout(**put(parts, layout_sharding), max_length=placement.max_length, axes=axes)
    if "content_k" in arrays:
        return LoadedBank(MemoryBank(**arrays, layout=layout), placement, store.spec)
    # Of its own, so that `store` may write, go on to other versions, or be closed.
    reader = BankReader(store.path, version=store.version)
    stored = DiskContent(reader, placement.source).stored()
    bank = MemoryBank(**arrays, content_k=None, content_v=None, stored=stored, layout=layout)
    return LoadedBank(bank, placement, store.spec, reader)
