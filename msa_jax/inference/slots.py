"""What the device keeps of the questions in progress, and what is read and told of it within a compiled step.

Sizes: B slots, b questions of one call, S columns of a cache, L layers, L_r router layers, N documents, A namespaces,
k documents selected, C chunks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from msa_jax.context import Context, KeyValues, Reuse
from msa_jax.memory import MemoryBank, tiers
from msa_jax.memory.selection import Selection
from msa_jax.model import MSATransformer
from msa_jax.routing import NO_SCORE
from msa_jax.sharding import MODEL


@struct.dataclass
class Slots:
    """What the device keeps of the questions in progress.

    Attributes:
      cache: [L, B, S, K, D], the template prefix first. What a slot holds behind its length is of no meaning.
      selection: [L_r, B, k] fields, what each router layer reads. None without a bank.
      asked: the same, as the question's own tokens alone select it, whatever was read since.
      near: content of what is selected, [L_r, B, k * longest, ...], if the bank's own is not on the device.
      head: tokens of the template prefix.
    """

    cache: KeyValues
    selection: Selection | None
    asked: Selection | None
    near: dict[str, jax.Array] | None
    head: int = struct.field(pytree_node=False)

    def context(self, past: KeyValues, length: jax.Array, offset: int) -> Context:
        """Of some slots: `length` [b] tokens of each, of which the first behind the template prefix is at `offset`."""
        return Context(past, length, offset + length - self.head)


@struct.dataclass
class Visibility:
    """Which documents are whose: `namespaces` [N] int32, A for none, and `born` [N] int32, when a document came."""

    namespaces: jax.Array
    born: jax.Array

    def of(self, allowed: jax.Array, seen: jax.Array) -> jax.Array:
        """[b, N] bool, what questions may see that name `allowed` [b, A] bool and came at `seen` [b] int32."""
        none = jnp.zeros((allowed.shape[0], 1), bool)
        named = jnp.take(jnp.concatenate([allowed, none], axis=1), self.namespaces, axis=1, mode="clip")
        return named & (self.born[None] <= seen[:, None])


def empty_slots(
    model: MSATransformer, template: Context | None, bank: MemoryBank | None, *, count: int, size: int
) -> Slots:
    """Slots without questions: the template prefix and room; `count` is B, `size` S."""
    cache, head = model.cache(count, size, template).past, 0 if template is None else template.size
    if bank is None:
        return Slots(cache=cache, selection=None, asked=None, near=None, head=head)
    selected = (bank.num_layers, count, min(model.config.top_k_documents, bank.num_documents))

    def nothing():
        zeros = [jnp.zeros(selected, jnp.int32) for _ in range(3)]
        return Selection(
            documents=zeros[0], scores=jnp.full(selected, NO_SCORE, jnp.float32), starts=zeros[1], lengths=zeros[2]
        )

    near = None
    if bank.tier != "device" and bank.layout.axes is None:
        one = jax.eval_shape(lambda bank, selection: fetched(bank, selection)[0], bank, nothing())
        near = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
    return Slots(cache=cache, selection=nothing(), asked=nothing(), near=near, head=head)


def still_there(selection: Selection, bank: MemoryBank) -> Selection:
    """A selection without documents that were deleted since: their place is nobody's."""
    there = jnp.take(bank.layout.lengths, selection.documents, mode="clip") > 0
    return selection.replace(
        scores=jnp.where(there, selection.scores, NO_SCORE), lengths=jnp.where(there, selection.lengths, 0)
    )


def places(slots: Slots, mesh: jax.sharding.Mesh) -> Slots:
    """Where a compiled step leaves slots on a mesh: caches are spread by heads over "model", the rest is whole."""
    whole = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), slots)
    heads = MODEL in mesh.axis_names and slots.cache.k.shape[3] % mesh.shape[MODEL] == 0
    by_head = jax.NamedSharding(mesh, jax.P(None, None, None, MODEL if heads else None))
    return whole.replace(cache=KeyValues(by_head, by_head))


def settled(slots: Slots, like: Any) -> Slots:
    """Slots put where a compiled step that is given them and `like` will leave them.

    Else the first step would be compiled twice: once for arrays that may lie anywhere, once for its own results.
    """
    fixed = [x.sharding for x in jax.tree.leaves(like) if isinstance(x, jax.Array) and x.committed]
    if not fixed:
        return slots
    mesh = getattr(fixed[0], "mesh", None)
    return jax.device_put(slots, fixed[0] if mesh is None else places(slots, mesh))


def at_rest(slots: Slots) -> Slots:
    """Slots that leave a compiled step as they came."""
    mesh = jax.sharding.get_abstract_mesh()
    return slots if mesh.empty else jax.lax.with_sharding_constraint(slots, places(slots, mesh))


def fetched(bank: MemoryBank, selection: Selection) -> tuple[dict[str, jax.Array], Selection]:
    """Content of what is selected, [L_r, b, k * longest, ...], and the selection in it, its starts from 0 in each."""
    near, local = tiers.fetch(bank, selection)
    b, k = selection.starts.shape[1:]
    each = k * near.layout.max_length
    arrays = {}
    for name, x in near.arrays.items():
        if x is not None:
            by_chunk = jnp.moveaxis(x, 2, 1) if name.endswith("scale") else x  # scales are [L_r, K, C]
            arrays[name] = by_chunk.reshape(by_chunk.shape[0], b, each, *by_chunk.shape[2:])
    starts = local.starts - each * jnp.arange(b, dtype=jnp.int32)[None, :, None]
    return arrays, local.replace(starts=starts, documents=selection.documents)


def near_bank(bank: MemoryBank, near: dict[str, jax.Array], selection: Selection) -> tuple[MemoryBank, Selection]:
    """The inverse of `fetched`, of some slots: what the model takes."""
    layers, b, each = near["content_k"].shape[:3]
    arrays = {}
    for name, x in near.items():
        flat = x.reshape(layers, b * each, *x.shape[3:])
        arrays[name] = jnp.moveaxis(flat, 1, 2) if name.endswith("scale") else flat
    k = selection.starts.shape[2]
    longest = each // k
    documents = jnp.arange(b * k, dtype=jnp.int32)
    layout = bank.layout.replace(
        chunk_documents=jnp.repeat(documents, longest, total_repeat_length=b * each),
        starts=documents * longest,
        lengths=jnp.full(documents.shape, longest, jnp.int32),
        max_length=longest,
    )
    starts = selection.starts + each * jnp.arange(b, dtype=jnp.int32)[None, :, None]
    return MemoryBank(routing_keys=None, layout=layout, **arrays), selection.replace(starts=starts)


def reuse(bank: MemoryBank, selection: Selection, near: dict[str, jax.Array] | None) -> Reuse:
    """What some slots go on to read of what they selected."""
    selection = still_there(selection, bank)
    return Reuse(bank, selection) if near is None else Reuse(*near_bank(bank, near, selection))
