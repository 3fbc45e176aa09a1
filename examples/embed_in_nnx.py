"""Somebody else's transformer gets a memory: one `MemorySparseAttention` in place of its attention.

    python examples/embed_in_nnx.py

The model below is nobody's in particular: LayerNorm, GELU, learned positions. Its middle layer's attention is
replaced by `MemorySparseAttention`. It encodes a few documents, then trains to continue a question with the
token that one of them holds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from msa_jax import AttentionConfig, MemorySparseAttention
from msa_jax.data import DocumentBatch, pack_documents
from msa_jax.memory import DocumentLayout
from msa_jax.training.losses import router_loss

VOCAB, WIDTH, CHUNK, DOCUMENTS = 64, 64, 4, 8


class Block(nnx.Module):
    """Pre-norm block around an attention layer."""

    def __init__(self, attention, rngs):
        self.attention = attention
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def mlp(self, x):
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class PlainAttention(nnx.Module):
    """Causal attention inside segments, as the layers without memory have it."""

    def __init__(self, rngs):
        self.attend = nnx.MultiHeadAttention(num_heads=4, in_features=WIDTH, decode=False, rngs=rngs)

    def __call__(self, x, segment_ids):
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        return self.attend(x, mask=same & nnx.make_causal_mask(segment_ids).astype(bool))


class TheirModel(nnx.Module):
    """Two plain blocks with a block that reads documents between them."""

    def __init__(self, rngs):
        config = AttentionConfig(
            hidden_size=WIDTH, num_heads=4, num_kv_heads=2, head_dim=16, chunk_size=CHUNK, top_k_documents=2,
            router_bias=True,
        )
        self.tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.first = Block(PlainAttention(rngs), rngs)
        self.reader = Block(MemorySparseAttention(config, rngs=rngs), rngs)
        self.last = Block(PlainAttention(rngs), rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def remember(self, documents: DocumentBatch):
        """Encode packed documents [R, W] up to the reading layer, once, and keep what it pools."""
        x = self.tokens(documents.tokens)
        x = self.first.mlp(x + self.first.attention(self.first.norm1(x), documents.segment_ids))
        layer = self.reader.attention
        _, states = layer.encode(
            self.reader.norm1(x), positions=documents.positions, segment_ids=documents.segment_ids
        )
        layout = DocumentLayout(
            chunk_documents=documents.chunk_documents,
            starts=documents.starts,
            lengths=documents.lengths,
            max_length=documents.tokens.shape[1] // CHUNK,
        )
        return layer.memory(states, layout)

    def __call__(self, questions, memory):
        """Logits [B, T, V] of questions [B, T], and the scores [B, N] that the router gave the documents."""
        segments = jnp.ones_like(questions)
        positions = jnp.broadcast_to(jnp.arange(questions.shape[1]), questions.shape)
        x = self.tokens(questions)
        x = self.first.mlp(x + self.first.attention(self.first.norm1(x), segments))
        asked = dict(positions=positions, memory=memory, return_scores=True)
        read = self.reader.attention(self.reader.norm1(x), **asked)
        x = self.reader.mlp(x + read.out)
        x = self.last.mlp(x + self.last.attention(self.last.norm1(x), segments))
        return self.tokens.attend(self.norm(x)), read.document_scores


def make_batch(rng):
    """Documents `key value noise...` of different lengths, and one question `key key` about each."""
    keys, values = rng.permutation(24)[:DOCUMENTS] + 8, rng.permutation(24)[:DOCUMENTS] + 32
    texts = [[k, v, *rng.integers(0, 8, rng.integers(1, 9))] for k, v in zip(keys, values, strict=True)]
    documents = pack_documents(texts, chunk_size=CHUNK, row_len=3 * CHUNK, num_rows=DOCUMENTS)
    return documents, jnp.asarray(np.stack([keys, keys], axis=1)), jnp.asarray(values)


def main(steps: int = 400) -> tuple[float, float]:
    """Train; returns the loss of the first and the last ten steps."""
    model = TheirModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    everything = jnp.ones((DOCUMENTS, DOCUMENTS), bool)

    @nnx.jit
    def step(model, optimizer, documents, questions, values):
        def loss_fn(model):
            logits, scores = model(questions, model.remember(documents))
            answer = optax.softmax_cross_entropy_with_integer_labels(logits[:, -1], values).mean()
            # Question i is about document i.
            route = router_loss(scores, jnp.eye(DOCUMENTS, dtype=bool), everything, method="infonce_decoupled")
            return answer + route.mean(), (answer, jnp.mean(jnp.argmax(scores, axis=1) == jnp.arange(DOCUMENTS)))

        (loss, (answer, found)), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        return loss, answer, found

    rng, losses = np.random.default_rng(0), []
    for i in range(steps):
        loss, answer, found = step(model, optimizer, *make_batch(rng))
        losses.append(float(loss))
        if i % 50 == 0 or i == steps - 1:
            print(f"step {i:3d}  loss {loss:.3f}  answer {answer:.3f}  right document first {found:.2f}")
    return float(np.mean(losses[:10])), float(np.mean(losses[-10:]))


if __name__ == "__main__":
    main()
