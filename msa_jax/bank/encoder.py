"""Stage 1 over a corpus: packed rows through one jit-compiled step of fixed shape, into a memory bank.

Sizes: R rows, W row length, P tokens a chunk, C chunks, N documents, L_r router layers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from msa_jax.data.batch import DocumentBatch
from msa_jax.memory import ChunkStates, DocumentLayout, MemoryBank
from msa_jax.model import MSATransformer


@functools.partial(jax.jit, static_argnames="graphdef")
def _encode_rows(graphdef, params, tokens, segment_ids, positions):
    model = nnx.merge(graphdef, params)
    states = model.encode_documents(tokens, segment_ids=segment_ids, positions=positions).states
    empty = jnp.full((tokens.size // model.config.chunk_size,), 0, jnp.int32)
    layout = DocumentLayout(chunk_documents=empty, starts=empty, lengths=empty, max_length=1)
    bank = model.bank(states, layout)
    return ChunkStates(routing_key=bank.routing_keys, content_k=bank.content_k, content_v=bank.content_v)


def encode_bank(
    model: MSATransformer, documents: DocumentBatch, *, rows_per_step: int = 64, progress: bool = False
) -> MemoryBank:
    """Encode packed documents into a bank in the model's compute dtype.

    The result does not depend on `rows_per_step` or on how documents were packed, beyond rounding.

    Args:
      model: whose parameters encode.
      documents: [R, W] packed rows (host arrays) of any number of documents.
      rows_per_step: rows that pass the model at once; sets the memory of activations.
      progress: show a progress bar of tokens.

    Returns:
      Bank of the chunks in use: C is their number, in the order of `documents.chunk_documents`.

    Raises:
      ValueError: W is no multiple of the model's chunk size, or the layout was made for another one.
    """
    rows, width = documents.tokens.shape
    chunk = model.config.chunk_size
    if width % chunk or rows * width != len(documents.chunk_documents) * chunk:
        raise ValueError(
            f"encode_bank: rows of {width} tokens with {len(documents.chunk_documents)} chunks were not packed for "
            f"this model's chunk size {chunk}; pack them with it."
        )
    graphdef, params = nnx.split(model)
    num_documents = len(documents.starts)
    used = documents.chunk_documents < num_documents
    # Positions of the used chunks in the result, so that padding leaves no trace in the bank.
    place = np.cumsum(used) - 1
    c = model.config
    shape = (len(c.router_layers), int(used.sum()))
    dtype = c.compute_dtype
    keys = np.zeros((*shape, c.router_width), dtype)
    content_k = np.zeros((*shape, c.num_kv_heads, c.head_dim), dtype)
    content_v = np.zeros_like(content_k)
    per_row = width // chunk
    total = int((documents.segment_ids > 0).sum())
    with tqdm(
        total=total, desc="encode", unit="tok", unit_scale=True, mininterval=1.0, disable=not progress
    ) as bar:
        for first in range(0, rows, rows_per_step):
            part = slice(first, min(rows, first + rows_per_step))
            arrays = (documents.tokens[part], documents.segment_ids[part], documents.positions[part])
            short = rows_per_step - (part.stop - part.start)
            padded = [np.pad(a, ((0, short), (0, 0))) for a in arrays]
            states = jax.device_get(_encode_rows(graphdef, params, *padded))
            chunks = slice(part.start * per_row, part.stop * per_row)
            keep, where = used[chunks], place[chunks][used[chunks]]
            for target, value in (
                (keys, states.routing_key), (content_k, states.content_k), (content_v, states.content_v)
            ):  # fmt: skip
                target[:, where] = value[:, : len(keep)][:, keep]
            bar.update(int((arrays[1] > 0).sum()))
    owners = documents.chunk_documents[used]
    lengths = documents.lengths
    starts = np.where(lengths > 0, place[np.minimum(documents.starts, len(place) - 1)], 0)
    layout = DocumentLayout(
        chunk_documents=jnp.asarray(owners),
        starts=jnp.asarray(starts, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        max_length=int(lengths.max(initial=1)),
    )
    return MemoryBank(
        routing_keys=jnp.asarray(keys),
        content_k=jnp.asarray(content_k),
        content_v=jnp.asarray(content_v),
        layout=layout,
    )
