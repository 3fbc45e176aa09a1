"""The MSA transformer: documents to a memory bank, an active context to logits (arXiv 2603.23516).

Sizes: B questions, T active tokens, S own tokens, R rows, W row length, L layers, L_r router layers,
E hidden, V vocabulary, K key/value heads, D head dim, C chunks, N documents, k documents selected.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import PartitionSpec as P

from msa_jax import routing
from msa_jax.config import MSAConfig
from msa_jax.layers.block import DecoderBlock, layers_of, scan_stack, stack
from msa_jax.layers.norm import RMSNorm
from msa_jax.memory import ChunkStates, DocumentLayout, LayerMemory, MemoryBank, Selection
from msa_jax.memory.selection import reads_alike
from msa_jax.sharding import Shardings, constrain


@struct.dataclass
class KeyValues:
    """Keys and values of own tokens for every layer: a template prefix, or a cache; [L, B, S, K, D]."""

    k: jax.Array
    v: jax.Array


@struct.dataclass
class EncodedDocuments:
    """Stage 1: `states` [L_r, C, K, D] float32; `hidden` [L + 1, R, W, E] when asked for (the last is normed)."""

    states: ChunkStates
    hidden: jax.Array | None = None


@struct.dataclass
class ModelOutput:
    """What the active context gives.

    Attributes:
      hidden: [B, T, E], after the final norm; `MSATransformer.logits` takes it.
      own: keys and values of prefix and own tokens, the start of a cache.
      document_scores: [L_r, B, N] float32 when asked for.
      selection: documents read by each router layer, [L_r, B, k] each field; None without a bank.
      same: [L_r, B] bool with `resume`: whether each router layer reads the same as before; False where left out.
      all_hidden: [L + 1, B, T, E] when asked for: the input of every layer, then `hidden`.
      queries: [L_r, B, T, M] float32 when asked for: what every token routes with, whether or not it may.
    """

    hidden: jax.Array
    own: KeyValues
    document_scores: jax.Array | None = None
    selection: Selection | None = None
    same: jax.Array | None = None
    all_hidden: jax.Array | None = None
    queries: jax.Array | None = None


def _concat(parts):
    parts = [p for p in parts if p is not None]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts) if parts else None


def _block(config: MSAConfig, layer: int, is_router: bool, rngs: nnx.Rngs) -> DecoderBlock:
    return DecoderBlock(config, config.spec_of(layer), router=is_router, rngs=rngs)


class MSATransformer(nnx.Module):
    """Decoder-only transformer whose router layers read a bank of independently encoded documents.

    Layers of one kind that follow each other are stored stacked, one leading axis of layers, and scanned.

    Args:
      config: sizes, dtypes and options.
      rngs: where parameters are drawn from.
      shardings: how activations are spread under a mesh.
    """

    def __init__(self, config: MSAConfig, *, rngs: nnx.Rngs, shardings: Shardings = Shardings()):  # noqa: B008
        self.config = c = config
        self.shardings = shardings
        self.embed = nnx.Embed(
            c.vocab_size, c.hidden_size, dtype=c.compute_dtype, param_dtype=c.storage_dtype,
            embedding_init=nnx.initializers.normal(0.02), rngs=rngs,
        )  # fmt: skip
        self.groups = nnx.List([
            stack(functools.partial(_block, c, first, is_router), count, rngs)
            for is_router, first, count in c.layer_groups
        ])  # fmt: skip
        self.final_norm = RMSNorm(c.hidden_size, eps=c.norm_eps, dtype=c.compute_dtype, param_dtype=c.storage_dtype)
        self.lm_head = None if c.tie_embeddings else nnx.Linear(
            c.hidden_size, c.vocab_size, use_bias=False, dtype=c.compute_dtype, param_dtype=c.storage_dtype, rngs=rngs
        )  # fmt: skip

    def _embed(self, tokens):
        # Gathered from where its columns are spread: else XLA moves activations, which are larger.
        table = self._whole_rows(self.embed.embedding[...]).astype(self.config.compute_dtype)
        return jnp.take(table, tokens, axis=0)

    def _whole_rows(self, table):
        return constrain(table, P(*self.shardings.embedding[:1]))

    @property
    def output_embedding(self) -> jax.Array:
        """[V, E], rows to score the hidden state against."""
        return self._whole_rows(self.embed.embedding[...] if self.lm_head is None else self.lm_head.kernel[...].T)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., E] to [..., V] float32."""
        table = self.output_embedding.astype(self.config.compute_dtype)
        return jnp.einsum("...e,ve->...v", hidden, table, preferred_element_type=jnp.float32)

    def _encode(self, tokens, positions, segment_ids, return_hidden):
        """Documents through the layers: chunk states, and every layer's input and the final hidden state if wanted."""
        spread = lambda x: constrain(x, self.shardings.documents)  # noqa: E731
        where = dict(positions=positions, segment_ids=segment_ids)
        x = spread(self._embed(tokens))
        hidden, states = [], []
        last = self.config.router_layers[-1]
        for (is_router, first, count), group in zip(self.config.layer_groups, self.groups, strict=True):

            def body(layer, x, _):
                y, extra = layer.encode(x, **where)
                return spread(y), (extra, x if return_hidden else None)

            # Only what is pooled matters of the last router layer, and nothing behind it.
            ends = not return_hidden and first + count > last
            whole = last - first if ends else count
            if whole:
                run = layers_of(group, slice(whole)) if ends else group
                x, (extra, inputs) = scan_stack(run, body, x, None, remat=self.config.remat)
                states.append(extra[0] if is_router else None)
                hidden.append(inputs)
            if ends:
                pooled = layers_of(group, whole).chunk_states(x, **where)
                states.append(jax.tree.map(lambda y: y[None], pooled))
                break
        return _concat(states), _concat([*hidden, self.final_norm(x)[None]]) if return_hidden else None

    def encode_documents(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array,
        positions: jax.Array,
        return_hidden: bool = False,
    ) -> EncodedDocuments:
        """Stage 1: every document attends to itself alone, in every layer, and is pooled in router layers.

        Args:
          tokens: [R, W] int32 packed rows; W a multiple of P, each document starts at a multiple of P.
          segment_ids: [R, W] int32, 0 for padding, else equal for the tokens of one document.
          positions: [R, W] int32, from 0 in each document.
          return_hidden: also return every layer's input.

        Returns:
          Chunk states of all router layers before normalisation; `bank` turns them into a memory bank.
        """
        states, hidden = self._encode(tokens, positions, segment_ids, return_hidden)
        return EncodedDocuments(states=states, hidden=hidden)

    def bank(self, states: ChunkStates, layout: DocumentLayout) -> MemoryBank:
        """Memory bank in the compute dtype from chunk states [L_r, C, K, D]."""
        dtype = self.config.compute_dtype
        return MemoryBank(
            routing_keys=routing.routing_key(states.routing_key, score=self.config.routing_score).astype(dtype),
            content_k=states.content_k.astype(dtype),
            content_v=states.content_v.astype(dtype),
            layout=layout,
        )

    def encode_template(self, tokens: jax.Array) -> KeyValues:
        """Keys and values [L, B, S, K, D] of template prefixes [B, S], positions from 0, without memory."""
        b, s = tokens.shape
        return self(tokens, positions=jnp.broadcast_to(jnp.arange(s), (b, s))).own

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array,
        mask: jax.Array | None = None,
        past: KeyValues | None = None,
        slot: jax.Array | None = None,
        bank: MemoryBank | None = None,
        route: jax.Array | None = None,
        visible: jax.Array | None = None,
        selection: Selection | None = None,
        also: Selection | None = None,
        resume: Selection | None = None,
        mean_over_tokens: bool | jax.Array = False,
        max_routing: int | None = None,
        bank_gradients: bool = False,
        return_hidden: bool = False,
        return_scores: bool = False,
        return_queries: bool = False,
    ) -> ModelOutput:
        """Stages 2 and 3: the active context attends to template prefix, selected documents, and itself.

        Args:
          tokens: [B, T] int32.
          positions: [B, T] int32; the active context starts at `config.position_offset`.
          mask: [B, S] bool, tokens that exist, those of `past` included; default all.
          past: a template prefix (batch 1 or B), or with `slot` a cache of fixed size S.
          slot: int32 [B] or one for all, where in the cache the one new token goes, at S or beyond nowhere; without it
            `past` is extended.
          bank: memory bank; None reads no memory.
          route: [B, T] bool, tokens that route (role 0); default all that `mask` keeps.
          visible: [B, N] bool, documents that a question may see; default all.
          selection: [L_r, B, k] fields, documents selected at prefill; skips routing.
          also: [L_r, B, k] fields, what tokens of `past` selected, where they route with those given.
          resume: [L_r, B, k] fields, what tokens of `past` read. Where a layer now selects other documents for every
            question, those tokens are no longer what they were, and the layers behind it are left out.
          mean_over_tokens, max_routing: see `MemorySparseAttention`.
          bank_gradients: say that the bank is differentiated. Results are the same: layers then take copies of
            their parts of the bank, which keeps gradients small, and else read it where it lies.
          return_hidden: also return every layer's input.
          return_scores: also return the score of every document; needs a bank, no `selection`, and a retriever that
            knows them.
          return_queries: also return the routing queries; needs a bank, no `selection` and no `max_routing`.

        Raises:
          ValueError: shapes or dtypes that do not fit together, those of the bank included.
        """
        c = self.config
        new = tokens.shape[1] if slot is None or past is None else 0  # a slot's token is within the cache
        expected = (tokens.shape[0], new + (0 if past is None else past.k.shape[2]))
        if mask is not None and mask.shape != expected:
            raise ValueError(f"MSATransformer: mask must be [B, S] = {expected}, got {mask.shape}.")
        if bank is not None:
            bank.check()
            if bank.num_layers != len(c.router_layers):
                raise ValueError(
                    f"MSATransformer: the model has {len(c.router_layers)} router layers, the bank {bank.num_layers}: "
                    "it is another model's."
                )
            if bank_gradients and bank.tier != "device":
                raise ValueError(
                    f"MSATransformer: bank_gradients needs content on the device, this bank's is on the {bank.tier}."
                )
        if return_scores and (bank is None or selection is not None):
            raise ValueError("MSATransformer: return_scores needs routing: give a bank and no selection.")
        if return_queries and (bank is None or selection is not None or max_routing is not None):
            raise ValueError(
                "MSATransformer: return_queries needs routing of all tokens: give a bank, no selection, no max_routing."
            )
        spread = lambda x: constrain(x, self.shardings.questions)  # noqa: E731
        x = spread(self._embed(tokens))
        own, scores, selections, queries, hidden, same = [], [], [], [], [], []
        first_router = 0
        stands = None if resume is None else jnp.ones(tokens.shape[0], bool)  # what tokens before these are
        # A cache goes from layer to layer whole and is written in place; taken apart, all of it would be copied.
        cached = slot is not None and past is not None
        cache = (past.k, past.v) if cached else None
        for (is_router, first, count), group in zip(c.layer_groups, self.groups, strict=True):
            reads_bank = is_router and bank is not None
            part = slice(first, first + count)
            routers = slice(first_router, first_router + count)
            first_router += count if is_router else 0
            xs = {"past": None if past is None or cached else (past.k[part], past.v[part])}
            xs["layer"] = jnp.arange(part.start, part.stop, dtype=jnp.int32) if cached else None
            if reads_bank:
                take = lambda x, routers=routers: x[routers]  # noqa: E731
                xs["memory"] = jax.tree.map(take, bank.arrays) if bank_gradients else None
                xs["index"] = None if bank_gradients else jnp.arange(routers.start, routers.stop, dtype=jnp.int32)
                xs["selection"], xs["also"], xs["before"] = jax.tree.map(take, (selection, also, resume))
                xs["last"] = jnp.arange(part.start, part.stop) == c.num_layers - 1

            def body(layer, carry, xs, reads_bank=reads_bank):
                x, cache, stands = carry
                past_k, past_v = xs["past"] or cache or (None, None)
                kwargs = dict(positions=positions, mask=mask, past_k=past_k, past_v=past_v, slot=slot)
                kwargs["layer"] = xs["layer"]
                if reads_bank:
                    own = xs["memory"] and LayerMemory(**xs["memory"], layout=bank.layout)
                    kwargs |= dict(
                        memory=own or bank.layer_at(xs["index"]),
                        route=route, visible=visible,
                        selection=xs["selection"], also=xs["also"], mean_over_tokens=mean_over_tokens,
                        max_routing=max_routing, return_scores=return_scores,
                    )  # fmt: skip
                y, result = layer(x, **kwargs)
                query = result.query.astype(jnp.float32) if return_queries and reads_bank else None
                caches = (result.k, result.v)
                own_now = None if cached else KeyValues(*caches)
                alike = None
                if reads_bank and stands is not None:
                    # What the last layer reads reaches no key or value of another token.
                    alike = xs["last"] | reads_alike(result.selection, xs["before"], biased=c.router_bias)
                    stands = stands & alike
                ys = (own_now, result.document_scores, result.selection, query, x if return_hidden else None, alike)
                return (spread(y), caches if cached else None, stands), ys

            def unless_over(layer, carry, xs, body=body):
                def nothing(carry, xs):
                    shapes = jax.eval_shape(functools.partial(body, layer), carry, xs)
                    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

                return jax.lax.cond(jnp.any(carry[2]), functools.partial(body, layer), nothing, carry, xs)

            run = body if resume is None else unless_over
            (x, cache, stands), ys = scan_stack(group, run, (x, cache, stands), xs, remat=c.remat)
            for kept, value in zip((own, scores, selections, queries, hidden, same), ys, strict=True):
                kept.append(value)
        x = self.final_norm(x)
        return ModelOutput(
            hidden=x,
            own=KeyValues(*cache) if cached else _concat(own),
            document_scores=_concat(scores),
            selection=_concat(selections),
            queries=_concat(queries),
            same=_concat(same),
            all_hidden=_concat([*hidden, x[None]]) if return_hidden else None,
        )
