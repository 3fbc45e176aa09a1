"""Constrained decoding: within brackets only numbers of documents that were routed to and not named yet."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_jax.data import Template
from msa_jax.inference import AskConfig, Engine
from msa_jax.inference.candidates import candidates_of
from tests.inference.scripted import Scripted, full_pass
from tests.inference.small import BUDGET, ENGINE, QUESTIONS, corpus_of, model_of, renderer

OPEN, CLOSE, V, C, D = 7, 8, 12, 4, 4
restrict = jax.jit(lambda candidates, logits: candidates.restrict(logits))
wrote = jax.jit(lambda candidates, token: candidates.wrote(token))
# Numbers of different lengths, as plain ones are: one may be the beginning of another.
numbers = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=D - 1).map(tuple), max_size=C, unique=True)
steps = st.lists(st.tuples(st.integers(0, V - 1), st.integers(0, 2**16)), max_size=12)


def spelt(number):
    return [OPEN, *number, CLOSE]


def permitted(candidates, written):
    """By definition: the tokens that may come after what was written."""
    left, number = list(candidates), None
    for token in written:
        if number is None:
            number = [] if token == OPEN else None
        elif not any(spelt(c)[1:][: len(number) + 1] == [*number, token] for c in left):
            number = None
        elif token == CLOSE:
            left.remove(tuple(number))
            number = None
        else:
            number.append(token)
    if number is None:
        return set(range(V)) - (set() if left else {OPEN})
    following = {spelt(c)[1:][len(number)] for c in left if list(c[: len(number)]) == number}
    return following or set(range(V))


@settings(max_examples=60)
@given(some=st.lists(st.tuples(st.none() | numbers, steps), min_size=3, max_size=3), split=st.integers(0, 12))
def test_what_may_come_next(some, split):
    held = [None if c is None else [spelt(n) for n in c] for c, _ in some]
    written = [[] for _ in some]
    state = candidates_of(held, written, opening=OPEN, shape=(C, D))
    for i in range(max(len(s) for _, s in some)):
        if i == split:  # the host counts along, as between two calls of a compiled step
            state = candidates_of(held, written, opening=OPEN, shape=(C, D))
        drawn = [s[i] if i < len(s) else (0, 0) for _, s in some]
        logits = np.stack([np.random.default_rng(seed).normal(size=V).astype(np.float32) for _, seed in drawn])
        found = np.asarray(restrict(state, logits))
        may = [set(range(V)) if c is None else permitted(c, w) for (c, _), w in zip(some, written, strict=True)]
        assert [set(np.flatnonzero(row > -np.inf)) for row in found] == may
        kept = found > -np.inf
        np.testing.assert_array_equal(found[kept], logits[kept])
        # Half of what is written keeps to it, the rest is anything: a turn's first token is not held.
        tokens = [int(found[r].argmax()) if drawn[r][1] % 4 else drawn[r][0] for r in range(3)]
        for turn, token in zip(written, tokens, strict=True):
            turn.append(token)
        state = wrote(state, np.array(tokens, np.int32))


class Naming(Scripted):
    """None in a script is the model's own token."""

    def _said(self, row, own):
        said = super()._said(row, own)
        return int(own) if said is None else said


def plain(**changes):
    return Template.compact(numbers="plain", **changes)


@pytest.mark.parametrize("template", [Template.compact, plain], ids=["place", "plain"])
def test_numbers_are_those_of_documents_routed_to(template):
    tell = renderer(template)
    engine = Naming(model_of(), tell, corpus_of(), dataclasses.replace(ENGINE, decode_steps=1))
    number = tell.tokenizer.number_ids(30)
    opening, closing = number[0], number[-1]
    # Opened by the script, twice in a turn where all numbers are as long; the model writes the digits.
    one = [opening, *[None] * (len(number) - 1)]
    again = one if template == Template.compact else []
    engine.scripts = dict.fromkeys(QUESTIONS, one + again + [tell.references([4])[-1]])
    for question in QUESTIONS:
        engine.seen.clear()
        pending = engine.submit(question, config=AskConfig(mode="constrained", budget=BUDGET))
        engine._until(pending)
        answer = pending.result()
        events = answer.rounds[0].events
        routed = {int(n) for layer in answer.rounds[0].documents for n in layer[: model_of().config.top_k_documents]}
        read = [e.number for e in events if e.kind == "read"]
        assert len(read) == 1 + bool(again) == len(set(read)) and set(read) <= routed
        if template == plain:
            continue
        chosen = 0
        for tokens, routing, visible, own in engine.seen[: len(one + again)]:
            began = max(i for i, t in enumerate(tokens) if t == opening) if opening in tokens else len(tokens)
            if closing in tokens[began:] or began == len(tokens):
                continue
            spelt_out = [tell.tokenizer.number_ids(n) for n in routed.difference(read[: chosen // 3])]
            size = len(tokens) - began
            following = [n[size] for n in spelt_out if n[:size] == tokens[began:]]
            logits, _ = full_pass(engine._model, tokens, routing, engine.corpus.bank, visible)
            assert own == max(following, key=lambda t: logits[t])
            chosen += 1
        assert chosen == 6


class Opens(Engine):
    """Its model begins every turn with a number."""

    def _prefill(self, batch, *, fresh, routes):
        written = super()._prefill(batch, fresh=fresh, routes=routes)
        return written.replace(token=np.full_like(written.token, renderer().tokenizer.number_ids(4)[0]))


def test_a_number_is_held_through_the_steps_of_one_call():
    """A place-value number of two digits, its closing bracket included, is what three steps write."""
    assert ENGINE.decode_steps == len(renderer().tokenizer.number_ids(4)) - 1
    engine = Opens(model_of(), renderer(), corpus_of(), ENGINE)
    pending = engine.submit(QUESTIONS[0], config=AskConfig(mode="constrained", budget=BUDGET))
    engine.step()
    routed = pending._interleave._routed.selected
    written = pending._interleave.written
    assert len(routed) >= 2 and written in [renderer().tokenizer.number_ids(n) for n in routed]
    engine.close()
