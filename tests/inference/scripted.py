"""An engine whose model computes every token and writes what a script says; what it would have written is kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msa_jax.context import Route
from msa_jax.inference.engine import Engine
from tests.inference.small import CONTEXT, renderer


def names(*numbers):
    """What a model writes that names documents in one turn."""
    ids = [renderer().reference(n) for n in numbers]
    return [token for one in ids[:-1] for token in one[:-1]] + ids[-1]


class Scripted(Engine):
    """Made for `decode_steps` of 1.

    Attributes:
      scripts: by question, the tokens to write; behind them the model's own.
      seen: (tokens, which of them route, [N] bool visible, the token that the model wrote behind them).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scripts, self.seen = {}, []

    def _said(self, slot, own):
        state = self._requests[slot]._interleave
        view, visible = self._requests[slot]._view, self.corpus.visibility
        visible = visible and np.asarray(visible.of(view.allowed[None], np.array([view.seen])))[0]
        self.seen.append((list(state.tokens), list(state.routing), visible, int(own)))
        script = self.scripts.get(state.question, [])
        return script[state.completion_tokens] if state.completion_tokens < len(script) else int(own)

    def _prefill(self, batch, *, fresh, routes):
        written = super()._prefill(batch, fresh=fresh, routes=routes)
        token = np.array(written.token)
        for i, slot in enumerate(batch.slots):
            if slot < self.config.slots and (written.same is None or written.same[:, i].all()):
                token[i] = self._said(slot, token[i])
        return written.replace(token=token)

    def _decode_some(self, states, sampling, *, longest):
        written = np.array(super()._decode_some(states, sampling, longest=longest))
        for slot, state in enumerate(states):
            if state is not None:
                written[slot, 0] = self._said(slot, written[slot, 0])
        return written


@functools.partial(jax.jit, static_argnames="graphdef")
def _full_pass(graphdef, params, tokens, route, length, bank, visible):
    model = nnx.merge(graphdef, params)
    template = model.encode_template(jnp.array([renderer().prefix]))
    read = None if bank is None else Route(bank, route, visible)
    output = model.prefill(tokens, lengths=length[None], template=template, read=read)
    return model.logits(output.hidden[0, length - 1]), output


def full_pass(model, tokens, route, bank=None, visible=None):
    """Logits [V] behind a context of one question, computed in one go without a cache, and the model's output."""
    pad = lambda x, kind: np.pad(np.array(x, kind), (0, CONTEXT - len(x)))[None]  # noqa: E731
    visible = None if bank is None else visible[None]
    return _full_pass(*nnx.split(model), pad(tokens, np.int32), pad(route, bool), np.int32(len(tokens)), bank, visible)
