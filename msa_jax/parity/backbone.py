"""Recompute what transformers recorded of a plain backbone: one pass, and greedy writing.

Sizes: B texts, T tokens of each, U tokens written, L layers, E hidden, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msa_jax.errors import DataError
from msa_jax.inference.programs import DecodeBatch, PrefillBatch, decode, prefill
from msa_jax.inference.sampling import from_settings
from msa_jax.inference.settings import Sampling
from msa_jax.inference.slots import empty_slots
from msa_jax.parity.recording import Recording, compiled
from msa_jax.parity.report import BACKBONE_TOLERANCE, Report


def check_backbone(recording: Recording) -> Report:
    """Compare every hidden state and the logits of `input_ids` [B, T], and `generated` [B, U], what greedily follows.

    Raises:
      ValueError: the folder holds no usable recording.
    """
    model = recording.model(position_offset=0)
    report = Report(f"{recording.path}: backbone")
    tokens = recording.array("input_ids", None, None)
    if not tokens.size or tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise DataError(f"{recording.path / 'io.npz'}: input_ids must be tokens below {model.config.vocab_size}.")
    graphdef, params = nnx.split(model)

    def whole(params, tokens):
        model = nnx.merge(graphdef, params)
        output = model.prefill(tokens, return_hidden=True)
        return output.all_hidden, model.logits(output.hidden)

    hidden, logits = compiled(whole)(params, tokens)
    for i, ours in enumerate(hidden):
        report.relative(f"hidden_{i}", ours, recording.array(f"hidden_{i}"), tolerance=BACKBONE_TOLERANCE)
    report.relative("logits", logits, recording.array("logits"), tolerance=BACKBONE_TOLERANCE)
    generated = recording.array("generated", len(tokens), None)
    report.equal("generated", _written(model, tokens, generated.shape[1]), generated)
    return report


def _written(model, tokens: np.ndarray, steps: int) -> np.ndarray:
    """[B, U], by the programs that answer questions."""
    batch, length = tokens.shape
    graphdef, params = nnx.split(model)
    greedy = from_settings([Sampling()] * batch)
    slots = empty_slots(model, None, None, count=batch, size=length + steps)
    nothing = np.zeros(batch, np.int32)
    prompt = PrefillBatch(
        slots=np.arange(batch, dtype=np.int32), tokens=tokens, lengths=np.full(batch, length, np.int32), begin=nothing,
        route=np.zeros(tokens.shape, bool), alone=np.zeros(batch, bool), allowed=np.ones((batch, 1), bool),
        seen=nothing, sampling=greedy,
    )  # fmt: skip
    slots, first = prefill(graphdef, params, None, slots, None, None, prompt, fresh=True, routes=False, reported=0)
    now = DecodeBatch(
        token=first.token, length=jnp.full(batch, length, jnp.int32), left=jnp.full(batch, steps - 1, jnp.int32),
        sampling=greedy,
    )  # fmt: skip
    _, rest = decode(
        graphdef, params, slots, None, now, columns=length + steps, steps=steps - 1, stop_tokens=()
    )
    return np.concatenate([np.asarray(first.token)[:, None], jax.device_get(rest)], axis=1)
