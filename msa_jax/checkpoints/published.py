"""Names, shapes and `config.json` of the published layouts: a family's own, with a router.

Equal consecutive layers are stored stacked on a leading axis here and one by one there; linear weights are
[in, out] here and [out, in] there.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from msa_jax import families
from msa_jax.config import MSAConfig
from msa_jax.model import MSATransformer
from msa_jax.sharding import Shardings


@dataclasses.dataclass(frozen=True)
class PublishedTensor:
    """Where one tensor of the published layout lives in an `MSATransformer`.

    Attributes:
      name: the published name.
      shape: the published shape.
      path: path of the parameter in `nnx.state(model)`.
      index: place on the parameter's leading axis of layers; None if it has none.
      transposed: the two are each other's transpose.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str | int, ...]
    index: int | None
    transposed: bool


def skeleton(
    config: MSAConfig,
    shardings: Shardings = Shardings(),  # noqa: B008
) -> tuple[nnx.GraphDef, list[tuple[tuple, nnx.Variable]]]:
    """Graph and parameters of a model, shapes only."""
    make = lambda: MSATransformer(config, rngs=nnx.Rngs(0), shardings=shardings)  # noqa: E731
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, nnx.to_flat_state(state)


@functools.cache
def published_tensors(config: MSAConfig) -> tuple[PublishedTensor, ...]:
    """Every parameter of a model of this config, one entry a published tensor."""
    tensors, names = [], families.family_of(_values(config)).tensors
    for path, variable in skeleton(config)[1]:
        shape, transposed = variable.shape, path[-1] == "kernel"
        if path[0] == "groups":
            _, first, count = config.layer_groups[path[1]]
            places = [(i, f"model.layers.{first + i}.{names[path[2:]]}") for i in range(count)]
            shape = shape[1:]
        else:
            places = [(None, names[path])]
        shape = shape[::-1] if transposed else shape
        tensors += [PublishedTensor(name, shape, path, index, transposed) for index, name in places]
    return tuple(tensors)


def to_published(state: nnx.State, config: MSAConfig) -> dict[str, jax.Array]:
    """Parameters, or their gradients, by published name and in the published orientation.

    Args:
      state: `nnx.state(model)`, or a state of that structure.
      config: the model's.
    """
    flat = dict(nnx.to_flat_state(state))
    return {t.name: published_value(flat[t.path][...], t) for t in published_tensors(config)}


def published_value(value: jax.Array, tensor: PublishedTensor) -> jax.Array:
    """One published tensor out of a parameter's value."""
    value = value if tensor.index is None else value[tensor.index]
    return value.T if tensor.transposed else value


def published_config(config: MSAConfig) -> dict[str, Any]:
    """The `config.json` from which `MSAConfig.from_checkpoint` reads `config` back, but for how it runs."""
    return families.write(_values(config))


def _values(config: MSAConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
