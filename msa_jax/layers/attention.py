"""Attention layers: local self-attention, and Memory Sparse Attention on top of it.

Sizes: B questions, T active tokens, S own tokens (a prefix or cache, then the T), E hidden, H query heads,
K key/value heads, D head dim, M = K * D, R rows of packed documents, W row length, P tokens a chunk,
C = R * W / P chunks, N documents, k documents selected.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx, struct

from msa_jax import routing
from msa_jax.config import AttentionConfig
from msa_jax.layers import sharded
from msa_jax.layers.linear import linear
from msa_jax.layers.norm import norm_of
from msa_jax.layers.rope import rope
from msa_jax.memory import ChunkStates, DocumentLayout, LayerMemory, Selection, tiers
from msa_jax.memory.selection import bias_of, merge
from msa_jax.spec import DEFAULT, LayerSpec
from pallas_kernels import gather_attention


@struct.dataclass
class AttentionOutput:
    """What a layer gives for the active context.

    Attributes:
      out: [B, T, E].
      k, v: [B, S, K, D], own keys and values after this call: the cache of the next one; all layers' with `layer`.
      document_scores: [B, N] float32, with `return_scores`.
      selection: the documents read; None in a layer without router or without memory.
      query: [B, T, M] float, what the tokens routed with, see `routing.routing_query`; None unless it routed.
    """

    out: jax.Array
    k: jax.Array
    v: jax.Array
    document_scores: jax.Array | None = None
    selection: Selection | None = None
    query: jax.Array | None = None


def pool_chunks(x: jax.Array, segment_ids: jax.Array, chunk_size: int) -> jax.Array:
    """Mean over the tokens that exist of each chunk: [R, W, ...] to [C, ...] float32.

    A document starts at a multiple of P, so a chunk holds tokens of one document and padding (segment 0);
    a ragged last chunk is the mean of what it has, and a chunk without tokens is 0.
    """
    rows, width = segment_ids.shape
    if width % chunk_size:
        raise ValueError(f"pool_chunks: row length {width} is not a multiple of the chunk size {chunk_size}.")
    exists = (segment_ids > 0).reshape(rows * width // chunk_size, chunk_size)
    chunks = x.astype(jnp.float32).reshape(*exists.shape, *x.shape[2:])
    weights = exists.reshape(*exists.shape, *[1] * (x.ndim - 2)).astype(jnp.float32)
    return jnp.sum(chunks * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1.0)


def _within(order: jax.Array, count: int, window: int) -> jax.Array:
    """Which keys the last `count` tokens have in their window, [B, 1, count, S], by the order of all tokens [B, S]."""
    return order[:, None, None, :] > order[:, None, -count:, None] - window


class SelfAttention(nnx.Module):
    """Grouped-query self-attention with RoPE; the spec says whether queries and keys are normalised before, and more.

    In an MSA model the lower layers are of this kind: they see a document alone, or a template prefix and
    the active context alone.
    """

    def __init__(self, config: AttentionConfig, spec: LayerSpec = DEFAULT, *, rngs: nnx.Rngs):
        self.config = config
        self.spec = spec
        c = config
        self.q_proj = linear(c.hidden_size, c.num_heads * c.head_dim, c, rngs, bias=spec.qkv_bias)
        self.k_proj = linear(c.hidden_size, c.router_width, c, rngs, bias=spec.qkv_bias)
        self.v_proj = linear(c.hidden_size, c.router_width, c, rngs, bias=spec.qkv_bias)
        self.o_proj = linear(c.num_heads * c.head_dim, c.hidden_size, c, rngs, bias=spec.o_bias)
        self.q_norm = norm_of(c.head_dim, c, spec) if spec.qk_norm else None
        self.k_norm = norm_of(c.head_dim, c, spec) if spec.qk_norm else None

    def _qkv(self, x, positions):
        c = self.config
        if x.ndim != 3 or x.shape[-1] != c.hidden_size or positions.shape != x.shape[:2]:
            raise ValueError(
                f"{type(self).__name__}: need x [B, T, {c.hidden_size}] and positions [B, T], "
                f"got {x.shape} and {positions.shape}."
            )
        heads = lambda y: y.reshape(*y.shape[:2], -1, c.head_dim)  # noqa: E731
        q, k, v = (heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        how = dict(theta=self.spec.rope_theta or c.rope_theta, scaling=self.spec.rope_scaling)
        q, k = rope(q, positions, **how), rope(k, positions, **how)
        if self.spec.query_scale is not None:  # attention itself divides by sqrt(D)
            q = q * jnp.asarray(self.spec.query_scale * math.sqrt(c.head_dim), q.dtype)
        return q, k, v

    def _encode(self, x, positions, segment_ids):
        q, k, v = self._qkv(x, positions)
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        if self.spec.window is not None:
            same &= _within(jnp.arange(x.shape[1])[None], x.shape[1], self.spec.window)
        out = jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), k, v

    def encode(
        self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Causal attention inside each document of packed rows.

        Args:
          x: [R, W, E] float.
          positions: [R, W] int32, from 0 in each document.
          segment_ids: [R, W] int32, 0 for padding.

        Returns:
          out [R, W, E], and the keys (after norm and RoPE) and values, [R, W, K, D].
        """
        return self._encode(x, positions, segment_ids)

    def _own(self, k, v, past_k, past_v, slot, layer):
        """Own keys and values to attend to, and those to give back: with `layer` the caches of all layers."""
        if past_k is None:
            return (k, v), (k, v)
        if slot is None:
            batch = (k.shape[0], *past_k.shape[1:])
            past_k, past_v = jnp.broadcast_to(past_k, batch), jnp.broadcast_to(past_v, batch)
            own = jnp.concatenate([past_k, k], axis=1), jnp.concatenate([past_v, v], axis=1)
            return own, own
        if k.shape[1] != 1:
            raise ValueError(f"{type(self).__name__}: a cache slot takes one token at a time, got T {k.shape[1]}.")
        # In place: nothing of the cache moves but what is written. A slot beyond the cache writes nothing.
        place = (jnp.arange(k.shape[0]), jnp.broadcast_to(slot, k.shape[:1]))
        place = place if layer is None else (layer, *place)
        write = lambda cache, new: cache.at[place].set(new[:, 0], mode="drop", unique_indices=True)  # noqa: E731
        caches = write(past_k, k), write(past_v, v)
        read = lambda x: x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)  # noqa: E731
        return tuple(map(read, caches)), caches

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array,
        mask: jax.Array | None = None,
        past_k: jax.Array | None = None,
        past_v: jax.Array | None = None,
        slot: jax.Array | None = None,
        layer: jax.Array | None = None,
    ) -> AttentionOutput:
        """Causal attention of the active context over `[past ; own tokens]`.

        Args:
          x: [B, T, E] float.
          positions: [B, T] int32.
          mask: [B, S] bool, own tokens that exist, past ones included; default all.
          past_k, past_v: [B or 1, S_past, K, D], a template prefix or a cache.
          slot: with it, `past_k` and `past_v` are a cache of fixed size S in which the one new token of each
            question is written at this index, int32 [B] or one for all; at S or beyond, nowhere. Without it, the T
            tokens are appended to the past.
          layer: with `slot`, scalar int32: the caches are those of all layers, [L, B, S, K, D], this one's is read
            and written where it lies, and they are what is given back.
        """
        q, k, v = self._qkv(x, positions)
        (k, v), caches = self._own(k, v, past_k, past_v, slot, layer)
        b, t = x.shape[:2]
        causal = jnp.arange(k.shape[1])[None, :] <= jnp.arange(t)[:, None] + (k.shape[1] - t)
        allowed = causal[None, None] if mask is None else causal[None, None] & mask[:, None, None, :]
        if self.spec.window is not None:
            order = jnp.arange(k.shape[1])[None] if mask is None else jnp.cumsum(mask, axis=1)
            allowed &= _within(order, t, self.spec.window)
        out = jax.nn.dot_product_attention(q, k, v, mask=allowed)
        return AttentionOutput(out=self.o_proj(out.reshape(b, t, -1)), k=caches[0], v=caches[1])


class MemorySparseAttention(SelfAttention):
    """Self-attention that also reads a memory of documents (arXiv 2603.23516, section 3).

    Documents pass through the layer once (`encode`), each attending to itself alone; their keys, values
    and routing keys are pooled into chunks of P tokens (`memory`). A question then passes through the same
    layer (the call): its routing tokens score every chunk by cosine in one matrix product, the `top_k_documents` best
    documents are selected, and every token attends to their chunks and to its own past in one softmax.

    It takes the place of a self-attention layer in any transformer: it adds no residual and no norm of its
    own input. Example, with `docs` [R, W, E] packed documents and `x` [B, T, E] a question::

        layer = MemorySparseAttention(AttentionConfig(hidden_size=64, chunk_size=8, top_k_documents=2), rngs=rngs)
        docs_out, states = layer.encode(docs, positions=doc_positions, segment_ids=segment_ids)
        memory = layer.memory(states, layout)
        result = layer(x, positions=positions, memory=memory, return_scores=True)

    Gradients reach the document pass through the content of the selected chunks, and the router through
    `result.document_scores` (give them to a loss of `msa_jax.training.losses`) and, with
    `config.router_bias`, through the attention itself. The selection passes none.

    Args:
      config: an `AttentionConfig` (an `MSAConfig` is one).
      spec: what else the layer is; default Qwen3's.
      rngs: where parameters are drawn from.
    """

    def __init__(self, config: AttentionConfig, spec: LayerSpec = DEFAULT, *, rngs: nnx.Rngs):
        super().__init__(config, spec, rngs=rngs)
        c = config
        self.router_q_proj = linear(c.hidden_size, c.num_heads * c.head_dim, c, rngs)
        self.router_k_proj = linear(c.hidden_size, c.router_width, c, rngs)
        if c.router_bias:
            self.router_beta = nnx.Param(jnp.full((c.num_heads,), c.router_bias_init, jnp.float32))

    def encode(
        self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array
    ) -> tuple[jax.Array, ChunkStates]:
        """Attention inside each document of packed rows, and what is pooled from them (stage 1).

        Args:
          x: [R, W, E] float; W a multiple of P, every document starts at a multiple of P.
          positions: [R, W] int32, from 0 in each document.
          segment_ids: [R, W] int32, 0 for padding, else equal for the tokens of one document.

        Returns:
          out [R, W, E], and `ChunkStates` of [C, K, D] float32, C = R * W / P in row-major order.

        Raises:
          ValueError: W is no multiple of P, or shapes do not fit.
        """
        out, k, v = self._encode(x, positions, segment_ids)
        return out, self._chunk_states(x, k, v, segment_ids)

    def chunk_states(self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array) -> ChunkStates:
        """What `encode` pools, without its attention: all that is needed of the last router layer."""
        _, k, v = self._qkv(x, positions)
        return self._chunk_states(x, k, v, segment_ids)

    def _chunk_states(self, x, k, v, segment_ids):
        router_k = self.router_k_proj(x).reshape(k.shape)
        pool = lambda y: pool_chunks(y, segment_ids, self.config.chunk_size)  # noqa: E731
        return ChunkStates(routing_key=pool(router_k), content_k=pool(k), content_v=pool(v))

    def memory(self, states: ChunkStates, layout: DocumentLayout) -> LayerMemory:
        """Memory that a question can read: routing keys normalised, all in the compute dtype."""
        key = functools.partial(routing.routing_key, score=self.config.routing_score)
        return LayerMemory(**states.arrays(key, self.config.compute_dtype), layout=layout)

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array,
        memory: LayerMemory | None = None,
        route: jax.Array | None = None,
        visible: jax.Array | None = None,
        selection: Selection | None = None,
        also: Selection | None = None,
        mean_over_tokens: bool | jax.Array = False,
        max_routing: int | None = None,
        return_scores: bool = False,
        mask: jax.Array | None = None,
        past_k: jax.Array | None = None,
        past_v: jax.Array | None = None,
        slot: jax.Array | None = None,
        layer: jax.Array | None = None,
        implementation: str | None = None,
    ) -> AttentionOutput:
        """Attention of the active context over `[past ; selected documents' chunks ; own tokens]` (stage 2, 3).

        Args:
          x: [B, T, E] float.
          positions: [B, T] int32; those of the published model start at `config.position_offset`.
          memory: what `memory` returned; None attends to the past and own tokens only.
          route: [B, T] bool, tokens that route; default all that `mask` keeps.
          visible: [B, N] bool, documents that a question may see; default all.
          selection: reuse what an earlier call selected (decoding) instead of routing.
          also: what tokens before these selected; they count as routing tokens too.
          mean_over_tokens: score by the mean over routing tokens, not the max (warm-up of training).
          max_routing: U, the most tokens of a question that route: only so many are scored. Of more, the first U
            route. Default T.
          return_scores: also return the score of every document; the retriever must know them, and route here.
          mask, past_k, past_v, slot, layer: as in `SelfAttention`.
          implementation: of both operations, see `pallas_kernels`; default `config.implementation`.

        Raises:
          ValueError: shapes or dtypes do not fit together, or scores of a selection that is reused.
          ConfigError: scores of a retriever that does not know them.
        """
        if return_scores and (memory is None or selection is not None):
            raise ValueError("MemorySparseAttention: return_scores needs routing: give a memory and no selection.")
        if memory is None:
            return super().__call__(
                x, positions=positions, mask=mask, past_k=past_k, past_v=past_v, slot=slot, layer=layer
            )
        c = self.config
        memory.check()
        implementation = implementation or c.implementation
        b, t = x.shape[:2]
        q, k, v = self._qkv(x, positions)
        (k, v), caches = self._own(k, v, past_k, past_v, slot, layer)
        if self.spec.window is not None and k.shape[1] > self.spec.window:
            raise ValueError(
                f"MemorySparseAttention: {k.shape[1]} own tokens do not fit this layer's window of {self.spec.window}: "
                "of those that read a memory only layers without a window take more; choose other router_layers."
            )
        scores = query = None
        if selection is None:
            wanted = (memory.layout.num_chunks, c.router_width)
            got = None if memory.routing_keys is None else memory.routing_keys.shape[-2:]
            if got != wanted:
                raise ValueError(f"MemorySparseAttention: to route, routing_keys must be [C, M] = {wanted}, got {got}.")
            if route is None:
                if mask is None or slot is not None:
                    route = jnp.ones((b, t), bool)
                else:
                    route = mask[:, -t:]
            asking = x
            if max_routing is not None and max_routing < t:
                # Of equals the first come first, so that the routing tokens keep their order.
                route, where = jax.lax.top_k(route.astype(jnp.int8), max_routing)
                route, asking = route > 0, jnp.take_along_axis(x, where[:, :, None], axis=1)
            projected = self.router_q_proj(asking)
            projected = projected.reshape(*projected.shape[:2], *q.shape[2:])
            query = routing.routing_query(projected, num_kv_heads=c.num_kv_heads, score=c.routing_score)
            if memory.routing_keys.dtype == jnp.int8:
                query = query.astype(c.compute_dtype)
            retriever = routing.retriever_of(c.retriever, memory.layout, implementation)
            asked = routing.Query(routing.averaged(query, route, mean_over_tokens), route)
            if return_scores:
                routing.need_scores(c.retriever, "return_scores")
                scores, selection = retriever.route_with_scores(asked, memory, visible, c.top_k_documents)
            else:
                selection = retriever.route(asked, memory, visible, c.top_k_documents)
            selection = selection if also is None else merge(selection, also)
        last = dict(bias=self._bias(selection), mask=mask, implementation=implementation)
        if memory.layout.axes is not None:
            out = sharded.attend(q, k, v, memory, selection, **last)
        else:
            content = tiers.content_of(memory, selection.starts, selection.lengths)
            out, _ = gather_attention(q, k, v, **content._asdict(), **last)
        return AttentionOutput(
            out=self.o_proj(out.reshape(b, t, -1)),
            k=caches[0],
            v=caches[1],
            document_scores=scores,
            selection=selection,
            query=query,
        )

    def _bias(self, selection: Selection) -> jax.Array | None:
        """What is added to the logits of the selected documents' chunks, [B, k, H] float32; None for nothing."""
        c = self.config
        if c.router_bias:
            bias = bias_of(selection, c.router_bias_scale * self.router_beta[...])
        elif c.proportional_attention:
            bias = jnp.zeros((*selection.lengths.shape, c.num_heads), jnp.float32)
        else:
            return None
        return bias + math.log(c.chunk_size) if c.proportional_attention else bias
