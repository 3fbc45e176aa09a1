"""The two jit-compiled steps of asking: tokens into the contexts of some questions, and decoding of all of them.

Every question has a slot: a cache of fixed size and what it reads. Which slots there are, how long they are and what
may be seen are arrays, so that questions come and go without anything being compiled.

Sizes: B slots, b questions of one call, T tokens of a prefill, S columns of a cache, U tokens decoded in a call,
L layers, L_r router layers, A namespaces, R documents reported, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx, struct

from msa_jax.context import Context, Resume, Route
from msa_jax.inference.candidates import Candidates
from msa_jax.inference.sampling import SamplingState, choose
from msa_jax.inference.slots import Slots, Visibility, at_rest, fetched, reuse, still_there
from msa_jax.memory import MemoryBank
from msa_jax.model import MSATransformer
from msa_jax.routing import Query, gives_scores
from msa_jax.routing.candidates import best_of_layers


@struct.dataclass
class PrefillBatch:
    """Tokens that are added to the contexts of b questions.

    Attributes:
      slots: [b] int32, of each question; B for one that is not there.
      tokens: [b, T] int32, padded at the end.
      lengths: [b] int32, how many there are, at least 1.
      begin: [b] int32, how many tokens of the slot come before them, the template prefix included.
      route: [b, T] bool, tokens that route.
      alone: [b] bool, only the question's own tokens route.
      allowed: [b, A] bool; seen: [b] int32: see `Visibility`.
      sampling: of the token that is written after them.
    """

    slots: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    begin: jax.Array
    route: jax.Array
    alone: jax.Array
    allowed: jax.Array
    seen: jax.Array
    sampling: SamplingState


@struct.dataclass
class Prefilled:
    """What a prefill gave.

    Attributes:
      token: [b] int32, written after the tokens.
      logits: [b, V] float32 that it was chosen from.
      same: [L_r, b] bool, whether what each router layer selects leaves the tokens before them as they are; None
        if none did route.
      documents: [L_r, b, R] int32, best documents of each router layer; None if it did not route.
      scores: [L_r, b, L_r * R] float32: of each router layer, the scores of all those documents, in their order.
    """

    token: jax.Array
    logits: jax.Array
    same: jax.Array | None
    documents: jax.Array | None
    scores: jax.Array | None


@struct.dataclass
class DecodeBatch:
    """Where b slots stand.

    Attributes:
      token: [b] int32, written last and not computed yet.
      length: [b] int32, tokens of the slot before it, the template prefix included.
      left: [b] int32, how many may be written; 0 for one that is not decoding.
      sampling: of the tokens to come.
      candidates: what numbers are held to; None where none are.
    """

    token: jax.Array
    length: jax.Array
    left: jax.Array
    sampling: SamplingState
    candidates: Candidates | None = None


# Of a bank all arrays are there, whether a step reads them or not: what `msa_jax.plan` counts.
_jit = functools.partial(jax.jit, donate_argnames=("slots",), keep_unused=True)


@functools.partial(_jit, static_argnames=("graphdef", "fresh", "routes", "reported"))
def prefill(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    template: Context | None,
    slots: Slots,
    bank: MemoryBank | None,
    visibility: Visibility | None,
    batch: PrefillBatch,
    *,
    fresh: bool,
    routes: bool,
    reported: int,
) -> tuple[Slots, Prefilled]:
    """Compute tokens of some questions and choose the token after them (stage 2; stage 3 of these tokens).

    Args:
      graphdef, params: `nnx.split(model)`.
      template: of one question, which all stand behind; None for none.
      slots: donated.
      bank, visibility: what is asked; both None without a memory.
      batch: the tokens.
      fresh: the tokens are the whole context, behind the prefix; else they come behind what a slot holds.
      routes: select documents: of a context that is not fresh by the question's own tokens and by those of the batch
        that route. Else what was selected is read.
      reported: R.
    """
    model: MSATransformer = nnx.merge(graphdef, params)
    size = slots.cache.k.shape[1]
    place = jnp.minimum(batch.slots, size - 1)
    mine = lambda tree: jax.tree.map(lambda x: x[:, place], tree)  # noqa: E731
    read, asked = None, None
    if bank is not None and routes:
        exists = jnp.arange(batch.tokens.shape[1])[None] < batch.lengths[:, None]
        read = Route(
            bank, batch.route & exists, visibility.of(batch.allowed, batch.seen),
            want=("scores",) if gives_scores(model.config.retriever) else ("queries",),
        )  # fmt: skip
        if not fresh:
            asked = still_there(mine(slots.asked), bank)
            read = Resume(bank, mine(slots.selection), asked, read.tokens, read.visible, want=read.want)
    elif bank is not None:
        read = reuse(bank, mine(slots.selection), mine(slots.near))
    if fresh:
        output = model.prefill(batch.tokens, lengths=batch.lengths, template=template, read=read)
    else:
        context = slots.context(mine(slots.cache), batch.begin, model.config.position_offset)
        output = model.extend(batch.tokens, context, lengths=batch.lengths, read=read)
    cache = slots.cache.put(output.own, begin=batch.begin, lengths=batch.lengths, rows=batch.slots)
    kept = slots.replace(cache=cache)
    last = jnp.take_along_axis(output.hidden, (batch.lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = model.logits(last)
    written = Prefilled(choose(logits, batch.sampling), logits, None, None, None)
    if bank is None or not routes:
        return at_rest(kept), written

    put = lambda old, new, at: jax.tree.map(lambda x, y: x.at[:, at].set(y, mode="drop"), old, new)  # noqa: E731
    selection = output.selection
    documents, scores = best_of_layers(
        selection, bank, scores=output.document_scores, query=Query(output.queries, read.tokens),
        visible=read.visible, also=asked, reported=reported,
    )  # fmt: skip
    alone = jnp.where(batch.alone, batch.slots, size)
    kept = kept.replace(asked=put(slots.asked, selection, alone))
    near = slots.near
    if near is not None:
        arrays, selection = fetched(bank, selection)
        near = put(near, arrays, batch.slots)
    kept = kept.replace(near=near, selection=put(slots.selection, selection, batch.slots))
    return at_rest(kept), Prefilled(written.token, logits, output.same, documents, scores)


@functools.partial(_jit, static_argnames=("graphdef", "columns", "steps", "stop_tokens"))
def decode(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    slots: Slots,
    bank: MemoryBank | None,
    batch: DecodeBatch,
    *,
    columns: int,
    steps: int,
    stop_tokens: tuple[int, ...],
) -> tuple[Slots, jax.Array]:
    """Go on writing in the first b slots, each at its own length (stage 3).

    Args:
      slots: donated.
      batch: of those slots.
      columns: of the cache that are read: as long as the longest of the slots will be, or more.
      steps: U.
      stop_tokens: any of them ends a question's text.

    Returns:
      [b, U] int32, padded with -1 behind a stop token, which is kept, and behind `batch.left` tokens.
    """
    model: MSATransformer = nnx.merge(graphdef, params)
    count = batch.token.shape[0]
    few = lambda tree: jax.tree.map(lambda x: x[:, :count], tree)  # noqa: E731
    used = jax.tree.map(lambda x: x[:, :count, :columns], slots.cache)
    read = None if bank is None else reuse(bank, few(slots.selection), few(slots.near))
    stops = jnp.asarray(stop_tokens, jnp.int32)

    def more(carry):
        step, _, _, running, *_ = carry
        return (step < steps) & jnp.any(running)

    def one(carry):
        step, context, token, running, written, held = carry
        hidden, context = model.decode(token, context, write=running, read=read)
        sampling = batch.sampling.replace(count=batch.sampling.count + step.astype(jnp.uint32))
        logits = model.logits(hidden)
        if held is not None:
            logits = jax.lax.cond(jnp.any(held.held), held.restrict, lambda logits: logits, logits)
        token = jnp.where(running, choose(logits, sampling), -1)
        held = None if held is None else held.wrote(token)
        written = jax.lax.dynamic_update_slice_in_dim(written, token[:, None], step, axis=1)
        running = running & ~jnp.isin(token, stops) & (step + 1 < batch.left)
        return step + 1, context, jnp.maximum(token, 0), running, written, held

    start = (
        jnp.int32(0), slots.context(used, batch.length, model.config.position_offset), batch.token,
        batch.left > 0, jnp.full((count, steps), -1, jnp.int32), batch.candidates,
    )  # fmt: skip
    _, context, _, _, written, _ = jax.lax.while_loop(more, one, start)
    back = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis=1)  # noqa: E731
    return at_rest(slots.replace(cache=jax.tree.map(back, slots.cache, context.past))), written
