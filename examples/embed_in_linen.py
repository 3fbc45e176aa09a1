"""`MemorySparseAttention` inside a Flax Linen model, through `flax.nnx.bridge`.

    python examples/embed_in_linen.py

A small NNX module does both of the layer's jobs in one call, encoding documents and answering questions, so
that Linen sees one submodule with one set of parameters.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.nnx import bridge

from msa_jax import AttentionConfig, MemorySparseAttention
from msa_jax.memory import DocumentLayout

VOCAB, WIDTH, CHUNK, DOCUMENTS, LENGTH = 48, 32, 4, 6, 8
CONFIG = AttentionConfig(
    hidden_size=WIDTH, num_heads=2, num_kv_heads=1, head_dim=16, chunk_size=CHUNK, top_k_documents=DOCUMENTS
)


class ReadDocuments(nnx.Module):
    """Documents [N, W, E], one a row, and questions [B, T, E] to what the questions read, [B, T, E]."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.attention = MemorySparseAttention(CONFIG, rngs=rngs)

    def __call__(self, documents, questions):
        number, length = documents.shape[:2]
        positions = jnp.broadcast_to(jnp.arange(length), (number, length))
        _, states = self.attention.encode(
            documents, positions=positions, segment_ids=jnp.ones((number, length), jnp.int32)
        )
        chunks = np.arange(number * length // CHUNK) // (length // CHUNK)
        memory = self.attention.memory(states, DocumentLayout.from_chunk_documents(chunks, number))
        asked = jnp.broadcast_to(jnp.arange(questions.shape[1]), questions.shape[:2])
        return self.attention(questions, positions=asked, memory=memory).out


class LinenReader(nn.Module):
    """A Linen model that embeds, reads, and names the value."""

    @nn.compact
    def __call__(self, documents, questions):
        embed = nn.Embed(VOCAB, WIDTH)
        read = bridge.ToLinen(ReadDocuments, name="reader")(embed(documents), embed(questions))
        x = embed(questions) + read
        return nn.Dense(VOCAB)(nn.LayerNorm()(x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(x)))))


def make_batch(rng):
    """Documents that repeat `key value`, and for each the question `key`."""
    keys, values = rng.permutation(20)[:DOCUMENTS], rng.permutation(20)[:DOCUMENTS] + 24
    documents = np.tile(np.stack([keys, values], axis=1), (1, LENGTH // 2))
    return jnp.asarray(documents), jnp.asarray(keys[:, None]), jnp.asarray(values)


def main(steps: int = 400) -> tuple[float, float]:
    """Train; returns the loss of the first and the last ten steps."""
    rng = np.random.default_rng(0)
    documents, questions, _ = make_batch(rng)
    model = LinenReader()
    params = model.init(jax.random.key(0), documents, questions)
    optimizer = optax.adamw(1e-2)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, documents, questions, values):
        def loss_fn(params):
            logits = model.apply(params, documents, questions)[:, -1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, values).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for i in range(steps):
        params, state, loss = step(params, state, *make_batch(rng))
        losses.append(float(loss))
        if i % 50 == 0 or i == steps - 1:
            print(f"step {i:3d}  loss {loss:.3f}")
    return float(np.mean(losses[:10])), float(np.mean(losses[-10:]))


if __name__ == "__main__":
    main()
