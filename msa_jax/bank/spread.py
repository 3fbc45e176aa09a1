"""A bank that was encoded in memory, spread over a mesh. One on disk is loaded over it: `load(store, mesh=...)`."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from msa_jax.memory import DocumentLayout, MemoryBank
from msa_jax.memory.places import chunks_of, in_parts
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
    lengths = np.asarray(bank.layout.lengths)
    per_part = max(1, -(-len(lengths) // ways))
    parts = [slice(s * per_part, (s + 1) * per_part) for s in range(ways)]
    room = max(1, *(int(lengths[part].sum()) for part in parts))
    none = np.zeros(ways, np.int64)
    places, starts = in_parts(lengths, parts, none, none, per_part, room)  # in equal parts a place is a number
    chunks = chunks_of(starts, lengths)
    owners = np.full(ways * room, ways * per_part, np.int32)
    owners[chunks] = np.repeat(places, lengths)
    source = chunks_of(np.asarray(bank.layout.starts), lengths)
    put = lambda values, *lead: jax.device_put(values, NamedSharding(mesh, P(*lead, axes)))  # noqa: E731

    def spread_out(values):
        values = np.asarray(values)
        spread = np.zeros((values.shape[0], len(owners), *values.shape[2:]), values.dtype)
        spread[:, chunks] = values[:, source]
        return put(spread, None)

    padded = lambda x: put(np.pad(x, (0, ways * per_part - len(x))).astype(np.int32))  # noqa: E731
    layout = DocumentLayout(
        put(owners), padded(starts), padded(lengths), max_length=bank.layout.max_length, axes=axes
    )
    return MemoryBank(*map(spread_out, (bank.routing_keys, bank.content_k, bank.content_v)), layout=layout)
