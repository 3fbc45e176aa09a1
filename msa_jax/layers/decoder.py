"""Documents, and active contexts, through all layers of a model: groups of equal layers, stacked and scanned.

Sizes: R rows, W row length, B questions, T active tokens, S tokens before them, L layers, L_r router layers, E hidden,
K key/value heads, D head dim, C chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from msa_jax.config import MSAConfig
from msa_jax.context import KeyValues, Read, Resume, Reuse, Route
from msa_jax.layers.block import layers_of, scan_stack
from msa_jax.memory import ChunkStates, LayerMemory
from msa_jax.memory.selection import reads_alike


def concat(parts: Sequence[Any]) -> Any:
    """Trees joined along their first axis, those that are None left out; None if all are."""
    parts = [p for p in parts if p is not None]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts) if parts else None


def encode_layers(
    groups: Sequence[nnx.Module],
    config: MSAConfig,
    x: jax.Array,
    *,
    positions: jax.Array,
    segment_ids: jax.Array,
    spread: Callable[[jax.Array], jax.Array],
    return_hidden: bool,
) -> tuple[ChunkStates, jax.Array, jax.Array | None]:
    """Packed documents [R, W, E] through the layers, up to the last router layer unless hidden states are wanted.

    Args:
      groups: stacks of equal layers, as `config.layer_groups` has them.
      positions, segment_ids: [R, W] int32.
      spread: keeps activations where they are on a mesh.

    Returns:
      Chunk states [L_r, C, K, D], what comes out, and with `return_hidden` the input of every layer [L, R, W, E].
    """
    where = dict(positions=positions, segment_ids=segment_ids)
    hidden, states = [], []
    last = config.router_layers[-1]
    for (is_router, first, count), group in zip(config.layer_groups, groups, strict=True):

        def body(layer, x, _):
            y, extra = layer.encode(x, **where)
            return spread(y), (extra, x if return_hidden else None)

        # Only what is pooled matters of the last router layer, and nothing behind it.
        ends = not return_hidden and first + count > last
        whole = last - first if ends else count
        if whole:
            run = layers_of(group, slice(whole)) if ends else group
            x, (extra, inputs) = scan_stack(run, body, x, None, remat=config.remat)
            states.append(extra[0] if is_router else None)
            hidden.append(inputs)
        if ends:
            pooled = layers_of(group, whole).chunk_states(x, **where)
            states.append(jax.tree.map(lambda y: y[None], pooled))
            break
    return concat(states), x, concat(hidden)


def ask_layers(
    groups: Sequence[nnx.Module],
    config: MSAConfig,
    x: jax.Array,
    *,
    positions: jax.Array,
    mask: jax.Array | None,
    read: Read | None,
    spread: Callable[[jax.Array], jax.Array],
    past: KeyValues | None = None,
    slot: jax.Array | None = None,
    return_hidden: bool = False,
) -> tuple[jax.Array, dict[str, Any]]:
    """Active contexts [B, T, E] through all layers: the one pass beneath `prefill`, `extend` and `decode`.

    Args:
      positions: [B, T] int32. mask: [B, S + T] bool, tokens that exist; [B, S] with `slot`.
      read: of a memory, and how.
      past: [L, B or 1, S, K, D], what stands before. With `slot` [B] it is a cache of which the one token takes that
        place, at S nowhere, and `own` is the cache.

    Returns:
      What comes out, and fields of `ModelOutput` by name.
    """
    bank = None if read is None else read.bank
    how, by_layer, differentiated = {}, {}, False
    match read:
        case Route():
            differentiated = read.bank_gradients
            mean = False if read.mean_over_tokens is None else read.mean_over_tokens
            how = dict(
                route=read.tokens, visible=read.visible, mean_over_tokens=mean, max_routing=read.max_routing
            )
        case Reuse():
            by_layer = dict(selection=read.selection)
        case Resume():
            how = dict(route=read.tokens, visible=read.visible)
            by_layer = dict(also=read.also, before=read.selection)
    resumes, want = isinstance(read, Resume), getattr(read, "want", ())
    if want:
        how["return_scores"] = "scores" in want
    outputs = []
    first_router = 0
    stands = jnp.ones(x.shape[0], bool) if resumes else None  # what tokens before these are
    # A cache goes from layer to layer whole and is written in place; taken apart, all of it would be copied.
    cached = slot is not None
    cache = (past.k, past.v) if cached else None
    for (is_router, first, count), group in zip(config.layer_groups, groups, strict=True):
        reads_bank = is_router and bank is not None
        part = slice(first, first + count)
        routers = slice(first_router, first_router + count)
        first_router += count if is_router else 0
        xs = {"past": None if past is None or cached else (past.k[part], past.v[part])}
        xs["layer"] = jnp.arange(part.start, part.stop, dtype=jnp.int32) if cached else None
        if reads_bank:
            take = lambda x, routers=routers: x[routers]  # noqa: E731
            xs["memory"] = jax.tree.map(take, bank.arrays) if differentiated else None
            xs["index"] = None if differentiated else jnp.arange(routers.start, routers.stop, dtype=jnp.int32)
            xs |= jax.tree.map(take, by_layer)
            xs["last"] = jnp.arange(part.start, part.stop) == config.num_layers - 1

        def body(layer, carry, xs, reads_bank=reads_bank):
            x, cache, stands = carry
            past_k, past_v = xs["past"] or cache or (None, None)
            kwargs = dict(positions=positions, mask=mask, past_k=past_k, past_v=past_v, slot=slot)
            kwargs["layer"] = xs["layer"]
            if reads_bank:
                own = xs["memory"] and LayerMemory(**xs["memory"], layout=bank.layout)
                kwargs |= how | dict(memory=own or bank.layer_at(xs["index"]))
                kwargs |= {name: xs[name] for name in by_layer if name != "before"}
            y, result = layer(x, **kwargs)
            caches = (result.k, result.v)
            kept = {"own": None if cached else KeyValues(*(cache[:, -x.shape[1] :] for cache in caches))}
            kept["document_scores"], kept["selection"] = result.document_scores, result.selection
            if "queries" in want and result.query is not None:
                kept["queries"] = result.query.astype(jnp.float32)
            if return_hidden:
                kept["all_hidden"] = x
            if reads_bank and resumes:
                # What the last layer reads reaches no key or value of another token.
                same = xs["last"] | reads_alike(result.selection, xs["before"], biased=config.router_bias)
                stands, kept["same"] = stands & same, same
            return (spread(y), caches if cached else None, stands), kept

        def unless_over(layer, carry, xs, body=body):
            def nothing(carry, xs):
                shapes = jax.eval_shape(functools.partial(body, layer), carry, xs)
                return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

            return jax.lax.cond(jnp.any(carry[2]), functools.partial(body, layer), nothing, carry, xs)

        (x, cache, stands), kept = scan_stack(
            group, unless_over if resumes else body, (x, cache, stands), xs, remat=config.remat
        )
        outputs.append(kept)
    found = {name: concat([o.get(name) for o in outputs]) for name in dict.fromkeys(k for o in outputs for k in o)}
    if cached:
        found["own"] = KeyValues(*cache)
    return x, found
