"""What a bank holds, takes and would take: on disk, and on a device in each form it can be loaded in."""

from __future__ import annotations

import os
from typing import Any

from msa_jax.bank.database import folder_of
from msa_jax.bank.manifest import BankSpec
from msa_jax.bank.reader import BankReader
from msa_jax.errors import BankError

# Accelerator memory in GiB, as the makers state it.
DEVICES = {
    "v5e": 16, "v5p": 95, "v6e": 32, "a100-40": 40, "a100": 80, "a800": 80, "h100": 80, "h200": 141, "b200": 180,
}  # fmt: skip
# Of a device's memory, what is left for a bank beside programs and activations. The model comes on top.
_USABLE = 0.9
_VERSIONS_SHOWN = 10


def chunk_bytes(spec: BankSpec) -> dict[str, dict[str, int]]:
    """Bytes of one chunk in all router layers, by tier (keys, content) and form (as stored, int8 with scales)."""
    element = spec.bytes_per_chunk // (spec.layers * (spec.width + 2 * spec.kv_heads * spec.head_dim))
    keys, content = spec.layers * spec.width, 2 * spec.layers * spec.kv_heads * spec.head_dim
    return {
        "keys": {spec.dtype: keys * element, "int8": keys + 4 * spec.layers},
        "content": {spec.dtype: content * element, "int8": content + 4 * 2 * spec.layers * spec.kv_heads},
    }


def on_device(spec: BankSpec, chunks: int, device: str) -> dict[str, Any]:
    """How a bank of `chunks` chunks fits devices of a kind, by arithmetic.

    Returns:
      For each form, bytes and how many devices hold them in nine tenths of their memory: everything, or the keys
      alone, with content in host memory or on disk.

    Raises:
      BankError: an unknown device.
    """
    if device not in DEVICES:
        raise BankError(f"no device {device!r}: one of {', '.join(DEVICES)}.")
    usable, sizes = DEVICES[device] * 2**30 * _USABLE, chunk_bytes(spec)
    needs = {}
    for form in dict.fromkeys([spec.dtype, "int8"]):
        keys, content = chunks * sizes["keys"][form], chunks * sizes["content"][form]
        for name, total in ((f"all {form}", keys + content), (f"keys {form}", keys)):
            needs[name] = {"bytes": total, "devices": -(-total // int(usable))}
    return {"device": device, "memory_bytes": DEVICES[device] * 2**30, "needs": needs}


def stats(store: BankReader, *, device: str | None = None) -> dict[str, Any]:
    """Counts, bytes by tier, bytes on disk, the latest versions, and with `device` what it would take there."""
    m, live = store.manifest, store.table.columns[store.table.alive]
    totals = {name: getattr(m, name) for name in ("version", "documents", "tokens", "chunks", "rows")}
    per_chunk = chunk_bytes(store.spec)
    result = totals | {
        "namespaces": {name: int((live[:, 3] == i).sum()) for i, name in enumerate(store.table.namespaces)},
        "bytes": {tier: {form: m.chunks * size for form, size in forms.items()} for tier, forms in per_chunk.items()},
        "disk_bytes": disk_bytes(store),
        "versions": [f"{v.version} {v.operation} {v.time}" for v in store.versions(last=_VERSIONS_SHOWN)],
    }
    return result | ({} if device is None else {"on_device": on_device(store.spec, m.chunks, device)})


def disk_bytes(store: BankReader) -> int | None:
    """Bytes of the database's files, earlier versions included; None where it is no folder."""
    if (place := folder_of(store.path)) is None:
        return None
    root = place / store.name
    return sum(entry.stat().st_size for entry in os.scandir(root / "d")) if (root / "d").is_dir() else 0
