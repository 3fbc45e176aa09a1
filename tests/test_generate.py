"""Greedy generation against a slow loop of full passes, stop tokens, and a batch against its prompts alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msa_jax import MemoryBank, MSAConfig, MSATransformer
from msa_jax.inference.generate import Context, generate
from msa_jax.memory import DocumentLayout

B, T, V, N, NEW, OFFSET = 3, 5, 41, 4, 6, 9
CONFIG = MSAConfig(
    vocab_size=V, hidden_size=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, mlp_size=20, top_k=2,
    position_offset=OFFSET, tie_embeddings=False,
)  # fmt: skip
RNG = np.random.default_rng(0)
TEMPLATE = RNG.integers(0, V, 3).astype(np.int32)
SIZES = np.array([3, T, 4])
MASK = np.arange(T) < SIZES[:, None]
TOKENS = np.where(MASK, RNG.integers(0, V, (B, T)), 0).astype(np.int32)
# Role -2 and -1 attend but do not route; whatever padding says, it does neither.
ROLES = np.array([[-2, 0, 0, 0, 0], [0, -2, 0, -1, -2], [0, 0, 0, -2, 0]], np.int32)


@functools.cache
def model_of():
    rng = np.random.default_rng(1)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MSATransformer(CONFIG, rngs=nnx.Rngs(0))))

    def draw(path, leaf):
        scale = "scale" in jax.tree_util.keystr(path)  # of a norm
        return jnp.asarray(scale + rng.normal(0, 0.5, leaf.shape), leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, state)


@functools.cache
def bank_of():
    rng, owners = np.random.default_rng(2), np.array([0, 0, 0, 1, 2, 2, 3])
    keys, content_k, content_v = (rng.normal(size=(1, 7, 2, 6)).astype(np.float32) for _ in range(3))
    keys = (keys / np.linalg.norm(keys, axis=-1, keepdims=True)).reshape(1, 7, 12)
    return MemoryBank(keys, content_k, 3 * content_v, layout=DocumentLayout.from_chunk_documents(owners, N))


def run(rows=slice(None), width=T, bank=None, visible=None, stop_tokens=(), template=TEMPLATE, new=NEW):
    context = Context(tokens=TOKENS[rows, :width], roles=ROLES[rows, :width], mask=MASK[rows, :width])
    return generate(
        *model_of(), jnp.asarray(template), context, bank, visible=visible, max_new_tokens=new, stop_tokens=stop_tokens
    )


@jax.jit
def full_pass(params, tokens, roles, exists, bank, visible):
    """Hidden state of the last token of one context, all of it at once after the template, no cache."""
    model = nnx.merge(model_of()[0], params)
    mask = jnp.concatenate([jnp.ones((1, len(TEMPLATE)), bool), exists], axis=1)
    positions = jnp.broadcast_to(OFFSET + jnp.arange(tokens.shape[1]), tokens.shape)
    output = model(
        tokens, positions=positions, mask=mask, past=model.encode_template(TEMPLATE[None]),
        bank=bank, route=(roles == 0) & exists, visible=visible,
    )  # fmt: skip
    return model.logits(output.hidden[0, exists.sum() - 1])


def slowly(row, bank, visible):
    tokens, roles = list(TOKENS[row, : SIZES[row]]), list(ROLES[row, : SIZES[row]])
    for _ in range(NEW):
        room = (0, T + NEW - len(tokens))
        logits = full_pass(
            model_of()[1], np.pad(tokens, room)[None].astype(np.int32), np.pad(roles, room)[None],
            np.pad(np.ones(len(tokens), bool), room)[None], bank, visible,
        )  # fmt: skip
        best = np.sort(logits)[-2:]
        assert best[1] - best[0] > 1e-3, "a tie: choose other weights"
        tokens.append(int(np.argmax(logits)))
        roles.append(-1)  # what the model wrote does not route
    return tokens[SIZES[row] :]


VISIBLE = np.array([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1]], bool)


def test_greedy_equals_a_slow_loop_of_full_passes():
    got = run(bank=bank_of(), visible=VISIBLE)
    want = [slowly(row, bank_of(), VISIBLE[row : row + 1]) for row in range(B)]
    np.testing.assert_array_equal(got.tokens, want)
    assert len(set(np.ravel(want))) > NEW  # not one token over and over
    assert got.selection.documents.shape == (1, B, 2) and got.document_scores.shape == (1, B, N)
    # A question reads what it may see, and the memory matters.
    for row in range(B):
        read = np.asarray(got.selection.documents)[0, row][np.asarray(got.selection.lengths)[0, row] > 0]
        assert VISIBLE[row, read].all()
    assert (run().tokens != got.tokens).any()


def test_without_a_bank():
    got = run()
    assert got.document_scores is None and got.selection is None
    np.testing.assert_array_equal(got.tokens, [slowly(row, None, None) for row in range(B)])


@pytest.mark.parametrize("row", [0, 1])
def test_a_right_padded_batch_equals_each_prompt_alone(row):
    rows = slice(row, row + 1)
    alone = run(rows, int(SIZES[row]), bank_of(), VISIBLE[rows])
    batch = run(bank=bank_of(), visible=VISIBLE)
    np.testing.assert_array_equal(alone.tokens[0], batch.tokens[row])
    np.testing.assert_allclose(alone.document_scores[:, 0], batch.document_scores[:, row], atol=1e-5)


def test_a_stop_token_ends_each_text_where_it_is_written():
    free = np.asarray(run(bank=bank_of(), visible=VISIBLE).tokens)
    stops = (next(token for token in range(V) if token not in free), int(free[2, 2]))
    got = np.asarray(run(bank=bank_of(), visible=VISIBLE, stop_tokens=stops).tokens)
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), NEW) for row in free]
    assert ends == [2, NEW, 3]  # at a token that the first text has twice, never, and in between
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(got[row, :end], free[row, :end])
        assert (got[row, end:] == -1).all()


def test_no_template_and_one_token():
    none = run(template=TEMPLATE[:0], new=1)
    assert none.tokens.shape == (B, 1) and (none.tokens >= 0).all()
    np.testing.assert_array_equal(run(template=TEMPLATE[:0], new=2).tokens[:, :1], none.tokens)
