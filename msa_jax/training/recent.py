"""Documents of recent batches that stay in memory: a bank that grows while it trains, at no cost of encoding.

A batch that encodes N documents asks its questions of those and of the documents of the last few batches, as they were
encoded then. These pass no gradient, but they are routed over, selected and attended to like all others: the best of
them are the negatives that the current router finds hardest, and the margins that a large bank needs are learned
without encoding one.

Sizes: Q batches kept, B questions, N documents a batch, C chunks a batch, L_r router layers, K key/value
heads, D head dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from msa_jax.data.batch import Batch, QuestionBatch
from msa_jax.memory import MemoryBank


@struct.dataclass
class RecentDocuments:
    """A ring of the last Q batches' documents.

    Attributes:
      routing_keys: [Q, L_r, C, M]. content_k, content_v: [Q, L_r, C, K, D]. All in the model's compute dtype.
      chunk_documents: [Q, C] int32, N for a chunk of no document. starts, lengths: [Q, N] int32.
      identities: [Q, N] int32, equal for the same document in any batch.
      written: scalar int32, batches written so far; the next goes to `written % Q`.
    """

    routing_keys: jax.Array
    content_k: jax.Array
    content_v: jax.Array
    chunk_documents: jax.Array
    starts: jax.Array
    lengths: jax.Array
    identities: jax.Array
    written: jax.Array

    @property
    def batches(self) -> int:
        return self.identities.shape[0]

    def ages(self) -> jax.Array:
        """[Q] int32: 1 for the batch before this one, 2 for that before it; above `written` where there is none."""
        return jnp.mod(self.written - 1 - jnp.arange(self.batches), self.batches) + 1


def no_recent(bank: MemoryBank, batches: int) -> RecentDocuments:
    """An empty ring of `batches` batches like the one whose bank, arrays or shapes of them, is given."""
    layout = bank.layout
    zeros = lambda x: jnp.zeros((batches, *x.shape), x.dtype)  # noqa: E731
    return RecentDocuments(
        routing_keys=zeros(bank.routing_keys),
        content_k=zeros(bank.content_k),
        content_v=zeros(bank.content_v),
        chunk_documents=zeros(layout.chunk_documents) + layout.num_documents,
        starts=zeros(layout.starts),
        lengths=zeros(layout.lengths),
        identities=zeros(layout.starts),
        written=jnp.zeros((), jnp.int32),
    )


def remember(recent: RecentDocuments, bank: MemoryBank, batch: Batch) -> RecentDocuments:
    """The ring after a batch, whose bank takes the place of the oldest."""
    slot = jnp.mod(recent.written, recent.batches)
    put = lambda ring, new: ring.at[slot].set(jax.lax.stop_gradient(jnp.asarray(new)))  # noqa: E731
    return RecentDocuments(
        routing_keys=put(recent.routing_keys, bank.routing_keys),
        content_k=put(recent.content_k, bank.content_k),
        content_v=put(recent.content_v, bank.content_v),
        chunk_documents=put(recent.chunk_documents, bank.layout.chunk_documents),
        starts=put(recent.starts, bank.layout.starts),
        lengths=put(recent.lengths, bank.layout.lengths),
        identities=put(recent.identities, batch.identities),
        written=recent.written + 1,
    )


def with_recent(
    bank: MemoryBank, batch: Batch, recent: RecentDocuments, use: jax.Array
) -> tuple[MemoryBank, QuestionBatch]:
    """The batch's bank and behind it those of the ring, and its questions with what they may see of all of them.

    A question may see documents of the last `use` batches, none of which is relevant to it: a document that is in this
    batch too is hidden in its older form, since it may be what the question asks for.

    Args:
      bank: of the batch, N documents and C chunks.
      use: scalar int32, how many of the Q batches take part.

    Returns:
      A bank of (1 + Q) * N documents and (1 + Q) * C chunks, and questions with `visible`, `relevant` [B, (1 + Q) * N].
    """
    n, c = bank.num_documents, bank.num_chunks
    batches = recent.batches
    behind = 1 + jnp.arange(batches, dtype=jnp.int32)[:, None]

    def join(own, ring):
        # [Q, L_r, C, ...] to [L_r, Q * C, ...], behind the batch's own [L_r, C, ...].
        past = jnp.moveaxis(ring, 0, 1).reshape(own.shape[0], batches * c, *own.shape[2:])
        return jnp.concatenate([own, jax.lax.stop_gradient(past)], axis=1)

    def owners(chunk_documents, first):
        return jnp.where(chunk_documents < n, chunk_documents + first, (1 + batches) * n)

    layout = bank.layout
    flat = lambda own, ring: jnp.concatenate([jnp.asarray(own), ring.reshape(-1)])  # noqa: E731
    whole = bank.replace(
        routing_keys=join(bank.routing_keys, recent.routing_keys),
        content_k=join(bank.content_k, recent.content_k),
        content_v=join(bank.content_v, recent.content_v),
        layout=layout.replace(
            chunk_documents=flat(owners(layout.chunk_documents, 0), owners(recent.chunk_documents, behind * n)),
            starts=flat(layout.starts, recent.starts + behind * c),
            lengths=flat(layout.lengths, recent.lengths),
        ),
    )
    present = (recent.ages() <= jnp.minimum(recent.written, use))[:, None]
    again = jnp.any(recent.identities[:, :, None] == jnp.asarray(batch.identities)[None, None, :], axis=2)
    seen = (present & ~again & (recent.lengths > 0)).reshape(-1)
    asked = batch.questions
    shape = (asked.visible.shape[0], batches * n)
    return whole, dataclasses.replace(
        asked,
        visible=jnp.concatenate([asked.visible, jnp.broadcast_to(seen, shape)], axis=1),
        relevant=jnp.concatenate([asked.relevant, jnp.zeros(shape, bool)], axis=1),
    )
