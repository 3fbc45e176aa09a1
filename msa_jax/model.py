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
from msa_jax.context import Context, KeyValues, Read, Resume, Reuse, Route
from msa_jax.layers.block import DecoderBlock, stack
from msa_jax.layers.decoder import ask_layers, concat, encode_layers
from msa_jax.layers.norm import norm_of
from msa_jax.memory import ChunkStates, DocumentLayout, MemoryBank, Selection
from msa_jax.sharding import Shardings, constrain


@struct.dataclass
class EncodedDocuments:
    """Stage 1: `states` [L_r, C, K, D] float32; `hidden` [L + 1, R, W, E] when asked for (the last is normed)."""

    states: ChunkStates
    hidden: jax.Array | None = None


@struct.dataclass
class ModelOutput:
    """What the tokens of the active context give.

    Attributes:
      hidden: [B, T, E], after the final norm; `MSATransformer.logits` takes it.
      own: keys and values of these tokens, [L, B, T, K, D]: `Context.add` puts them into a cache.
      document_scores: [L_r, B, N] float32 when asked for (`Route.want`).
      selection: documents read by each router layer, [L_r, B, k] each field; None without a bank.
      same: [L_r, B] bool with `Resume`: whether each router layer reads the same as before; False where left out.
      all_hidden: [L + 1, B, T, E] when asked for: the input of every layer, then `hidden`.
      queries: [L_r, B, T or U, M] float32 when asked for: what tokens route with, whether or not they may; with
        `max_routing` those of its U alone.
    """

    hidden: jax.Array
    own: KeyValues
    document_scores: jax.Array | None = None
    selection: Selection | None = None
    same: jax.Array | None = None
    all_hidden: jax.Array | None = None
    queries: jax.Array | None = None


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
        self.final_norm = norm_of(c.hidden_size, c, c.spec_of(c.num_layers - 1))
        self.lm_head = None if c.tie_embeddings else nnx.Linear(
            c.hidden_size, c.vocab_size, use_bias=False, dtype=c.compute_dtype, param_dtype=c.storage_dtype, rngs=rngs
        )  # fmt: skip

    def _embed(self, tokens):
        # Gathered from where its columns are spread: else XLA moves activations, which are larger.
        table = self._whole_rows(self.embed.embedding[...]).astype(self.config.compute_dtype)
        x = jnp.take(table, tokens, axis=0)
        scale = self.config.embedding_scale
        return x if scale == 1 else x * jnp.asarray(scale, self.config.storage_dtype).astype(x.dtype)

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
        spread = lambda x: constrain(x, self.shardings.documents)  # noqa: E731
        states, x, inputs = encode_layers(
            self.groups, self.config, spread(self._embed(tokens)),
            positions=positions, segment_ids=segment_ids, spread=spread, return_hidden=return_hidden,
        )  # fmt: skip
        hidden = concat([inputs, self.final_norm(x)[None]]) if return_hidden else None
        return EncodedDocuments(states=states, hidden=hidden)

    def bank(self, states: ChunkStates, layout: DocumentLayout) -> MemoryBank:
        """Memory bank in the compute dtype from chunk states [L_r, C, K, D]."""
        key = functools.partial(routing.routing_key, score=self.config.routing_score)
        return MemoryBank(**states.arrays(key, self.config.compute_dtype), layout=layout)

    # Questions

    def encode_template(self, tokens: jax.Array) -> Context | None:
        """Template prefixes [B, S] int32 at positions from 0, without memory: what questions stand behind.

        B may be 1, for a prefix that all questions share. None of S 0: questions then stand behind nothing.
        """
        b, s = tokens.shape
        if not s:
            return None
        own = self.prefill(tokens, positions=jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s))).own
        return Context(own, jnp.full(b, s, jnp.int32), jnp.full(b, self.config.position_offset, jnp.int32))

    def cache(self, batch: int, size: int, template: Context | None = None) -> Context:
        """Room for `size` tokens of each of `batch` questions, those of the template first."""
        c = self.config
        shape = (c.num_layers, batch, size, c.num_kv_heads, c.head_dim)
        # Two arrays of their own: a step that is given the cache may have both donated.
        past = KeyValues(k=jnp.zeros(shape, c.compute_dtype), v=jnp.zeros(shape, c.compute_dtype))
        length = jnp.zeros(batch, jnp.int32)
        if template is not None:
            past = jax.tree.map(lambda x, first: x.at[:, :, : template.size].set(first), past, template.past)
            length = jnp.broadcast_to(template.length, batch)
        return Context(past, length, jnp.full(batch, c.position_offset, jnp.int32))

    def prefill(
        self,
        tokens: jax.Array,
        *,
        lengths: jax.Array | None = None,
        template: Context | None = None,
        positions: jax.Array | None = None,
        read: Route | Reuse | None = None,
        return_hidden: bool = False,
    ) -> ModelOutput:
        """Begin a context: tokens that attend to the template, to what they read, and to themselves (stage 2).

        Args:
          tokens: [B, T] int32, padded at the end.
          lengths: [B] int32, how many there are of each question; default T.
          template: what `encode_template` gave; None for none.
          positions: [B, T] int32; default from `config.position_offset` on.
          read: of a memory, and how; None reads none.
          return_hidden: also return every layer's input.

        Raises:
          ValueError: shapes or dtypes that do not fit together, those of the bank included.
          ConfigError: scores are wanted of a retriever that does not know them.
        """
        if positions is None:
            positions = self.config.position_offset + self._places(tokens)
        return self._append(tokens, positions, lengths, template, read, return_hidden)

    def extend(
        self,
        tokens: jax.Array,
        context: Context,
        *,
        lengths: jax.Array | None = None,
        read: Reuse | Resume | None = None,
    ) -> ModelOutput:
        """Go on with a context: more tokens behind those that it holds, in one pass. See `prefill`.

        Args:
          context: of B questions, or of one that stands for all; `Context.add` puts what comes of it behind.
        """
        return self._append(tokens, context.position[:, None] + self._places(tokens), lengths, context, read)

    def decode(
        self, token: jax.Array, context: Context, *, write: jax.Array | None = None, read: Reuse | None = None
    ) -> tuple[jax.Array, Context]:
        """Go on with a context by one token a question, in a cache that is written in place (stage 3).

        Args:
          token: [B] int32.
          context: a cache of B questions, `length` of each below its size.
          write: [B] bool, questions whose token is kept; of others the context stays, and what is given means nothing.
          read: the documents that were selected at prefill; None reads no memory.

        Returns:
          The hidden state [B, E], which `logits` takes, and the context with the token behind.
        """
        own = jnp.arange(context.size)[None] <= context.length[:, None]
        slot = context.length if write is None else jnp.where(write, context.length, context.size)
        output = self._run(
            token[:, None], positions=context.position[:, None], mask=own, past=context.past, slot=slot, read=read
        )
        one = jnp.int32(1) if write is None else write.astype(jnp.int32)
        return output.hidden[:, 0], Context(output.own, context.length + one, context.position + one)

    @staticmethod
    def _places(tokens):
        return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)

    def _append(self, tokens, positions, lengths, context, read, return_hidden=False):
        b, t = tokens.shape
        exists = None
        if lengths is not None:
            if lengths.shape != (b,):
                raise ValueError(f"MSATransformer: lengths must be [B] = {(b,)}, got {lengths.shape}.")
            exists = jnp.arange(t)[None] < lengths[:, None]
        if isinstance(read, Route | Resume) and read.tokens is not None and exists is not None:
            read = read.replace(tokens=read.tokens & exists)
        if context is None:
            return self._run(tokens, positions=positions, mask=exists, read=read, return_hidden=return_hidden)
        before = jnp.arange(context.size)[None] < context.length[:, None]
        parts = [before, jnp.ones((b, t), bool) if exists is None else exists]
        mask = jnp.concatenate([jnp.broadcast_to(x, (b, x.shape[1])) for x in parts], axis=1)
        return self._run(
            tokens, positions=positions, mask=mask, past=context.past, read=read, return_hidden=return_hidden
        )

    def _check(self, bank: MemoryBank, read: Read) -> None:
        bank.check()
        if bank.num_layers != len(self.config.router_layers):
            raise ValueError(
                f"MSATransformer: the model has {len(self.config.router_layers)} router layers, the bank "
                f"{bank.num_layers}: it is another model's."
            )
        if isinstance(read, Route) and read.bank_gradients and bank.tier != "device":
            raise ValueError(
                f"MSATransformer: bank_gradients needs content on the device, this bank's is on the {bank.tier}."
            )

    def _run(self, tokens, *, read, return_hidden=False, **where) -> ModelOutput:
        if read is not None:
            self._check(read.bank, read)
        spread = lambda x: constrain(x, self.shardings.questions)  # noqa: E731
        x, found = ask_layers(
            self.groups, self.config, spread(self._embed(tokens)),
            read=read, spread=spread, return_hidden=return_hidden, **where,
        )  # fmt: skip
        x = self.final_norm(x)
        if return_hidden:
            found["all_hidden"] = concat([found["all_hidden"], x[None]])
        return ModelOutput(hidden=x, **found)
