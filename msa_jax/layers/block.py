"""A pre-norm decoder block, and stacks of equal blocks run by `jax.lax.scan`."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

from msa_jax.config import MSAConfig
from msa_jax.layers.attention import AttentionOutput, MemorySparseAttention, SelfAttention
from msa_jax.layers.mlp import GatedMLP
from msa_jax.layers.norm import norm_of
from msa_jax.memory import ChunkStates
from msa_jax.spec import DEFAULT, LayerSpec


class DecoderBlock(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; with `spec.post_norms`, of what is added the norm."""

    def __init__(self, config: MSAConfig, spec: LayerSpec = DEFAULT, *, router: bool, rngs: nnx.Rngs):
        norm = lambda: norm_of(config.hidden_size, config, spec)  # noqa: E731
        self.attention_norm = norm()
        self.attention = (MemorySparseAttention if router else SelfAttention)(config, spec, rngs=rngs)
        self.attention_post_norm = norm() if spec.post_norms else None
        self.mlp_norm = norm()
        self.mlp = GatedMLP(config, spec, rngs=rngs)
        self.mlp_post_norm = norm() if spec.post_norms else None

    def _rest(self, x, attended):
        """What follows the attention."""
        x = x + (self.attention_post_norm(attended) if self.attention_post_norm else attended)
        out = self.mlp(self.mlp_norm(x))
        return x + (self.mlp_post_norm(out) if self.mlp_post_norm else out)

    def encode(self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array):
        """Documents [R, W, E] through the block; also what its attention's `encode` gives beside the output."""
        out, *extra = self.attention.encode(self.attention_norm(x), positions=positions, segment_ids=segment_ids)
        return self._rest(x, out), extra

    def chunk_states(self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array) -> ChunkStates:
        """What a router layer pools of documents [R, W, E], without what layers behind it would need."""
        return self.attention.chunk_states(self.attention_norm(x), positions=positions, segment_ids=segment_ids)

    def __call__(self, x: jax.Array, **kwargs) -> tuple[jax.Array, AttentionOutput]:
        """Active context [B, T, E] through the block; `kwargs` go to the attention."""
        result = self.attention(self.attention_norm(x), **kwargs)
        return self._rest(x, result.out), result


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module whose parameters carry a leading axis of `count` independently drawn layers."""
    keys = jax.random.split(rngs.params(), count)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(keys))


def layers_of(stacked: nnx.Module, layers: slice | int) -> nnx.Module:
    """Some layers of a stack, as a stack, or the one at an index."""
    graphdef, state = nnx.split(stacked)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[layers], state))


def scan_stack(stacked: nnx.Module, body: Callable, x: jax.Array, xs, *, remat: str):
    """Run `body(layer, x, xs_of_layer) -> (x, ys)` over the leading axis of `stacked`; returns x and stacked ys.

    Scanning compiles one layer however many there are (docs/design.md has the measurement).
    """
    graphdef, state = nnx.split(stacked)

    def step(carry, inputs):
        layer_state, layer_xs = inputs
        return body(nnx.merge(graphdef, layer_state), carry, layer_xs)

    if remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)
    return jax.lax.scan(step, x, (state, xs))
