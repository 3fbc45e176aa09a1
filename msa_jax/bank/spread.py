"""A bank that was encoded in memory, spread over a mesh. One on disk is loaded over it: `load(store, mesh=...)`."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from msa_jax.memory import DocumentLayout, MemoryBank
from msa_jax.sharding import Shardings


def spread(bank: MemoryBank, mesh: jax.sharding.Mesh, shardings: Shardings) -> MemoryBank:
    """The same documents in equal parts, each whole on one device; their numbers stay.

    Args:
      bank: on one device, in floats; document after document, as `encode_bank` makes it.
      mesh: read it under `jax.set_mesh` of that.
      shardings: its `bank` names the axes.

    Returns:
      Bank with N and C padded: to equal numbers of documents, and to the chunks of the fullest part.

    Raises:
      ValueError: a bank that is spread already or quantised, or no axes.
    """
    axes = shardings.bank
    if axes is None or bank.layout.axes is not None or bank.key_scale is not None or bank.tier != "device":
        raise ValueError("spread: needs a bank of floats on one device, and shardings that name mesh axes for it.")
    ways = math.prod(mesh.shape[name] for name in axes)
    starts, lengths = np.asarray(bank.layout.starts), np.asarray(bank.layout.lengths)
    per_part = max(1, -(-len(starts) // ways))
    parts = [slice(s * per_part, (s + 1) * per_part) for s in range(ways)]
    room = max(1, *(int(lengths[part].sum()) for part in parts))
    documents = ways * per_part
    source = np.zeros(ways * room, np.int64)
    owners = np.full(ways * room, documents, np.int32)
    new_starts, new_lengths = np.zeros(documents, np.int32), np.zeros(documents, np.int32)
    new_lengths[: len(lengths)] = lengths
    for s, part in enumerate(parts):
        count = lengths[part]
        ends = np.cumsum(count)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - count, count)
        place = slice(s * room, s * room + len(within))
        source[place] = np.repeat(starts[part], count) + within
        owners[place] = np.repeat(np.arange(part.start, part.start + len(count)), count)
        new_starts[part.start : part.start + len(count)] = s * room + ends - count

    def put(values, spec):
        return jax.device_put(values, NamedSharding(mesh, spec))

    used = owners < documents
    arrays = {}
    for name in ("routing_keys", "content_k", "content_v"):
        values = np.asarray(getattr(bank, name))[:, source]
        values[:, ~used] = 0
        arrays[name] = put(values, P(None, axes))
    layout = DocumentLayout(
        chunk_documents=put(owners, P(axes)),
        starts=put(new_starts, P(axes)),
        lengths=put(new_lengths, P(axes)),
        max_length=bank.layout.max_length,
        axes=axes,
    )
    return MemoryBank(**arrays, layout=layout)
