"""Which retrievers there are, and the one that a model's setting names."""

from __future__ import annotations

import dataclasses

from msa_jax.errors import ConfigError, require
from msa_jax.memory.bank import DocumentLayout
from msa_jax.routing.approximate import Approximate
from msa_jax.routing.exact import Exact
from msa_jax.routing.interface import Retriever
from msa_jax.routing.sharded import Sharded
from msa_jax.routing.two_level import TwoLevel

RETRIEVERS: dict[str, type[Retriever]] = {
    "exact": Exact,
    "approximate": Approximate,
    "two_level": TwoLevel,
}


def parse(setting: str) -> Retriever:
    """The retriever of a setting: a name, or a name with settings such as "approximate:recall=0.9".

    Raises:
      ConfigError: no such retriever, no such setting of it, or a value that it cannot have.
    """
    name, _, rest = str(setting).partition(":")
    require(name in RETRIEVERS, f"retriever must be one of {tuple(RETRIEVERS)}, got {setting!r}.")
    kinds = {f.name: type(f.default) for f in dataclasses.fields(RETRIEVERS[name]) if f.name != "implementation"}
    values = {}
    for part in filter(None, rest.split(",")):
        key, _, text = part.partition("=")
        try:
            values[key] = kinds[key](text)
        except (KeyError, ValueError) as e:
            known = ", ".join(f"{name}:{key}={kind.__name__.upper()}" for key, kind in kinds.items())
            raise ConfigError(f"retriever {setting!r}: {part!r} is no setting of it; it has {known or 'none'}.") from e
    return RETRIEVERS[name](**values)


def retriever_of(setting: str, layout: DocumentLayout, implementation: str | None = None) -> Retriever:
    """The retriever that a setting names, over a memory of this layout: on one device, or spread over some."""
    retriever = dataclasses.replace(parse(setting), implementation=implementation)
    return retriever if layout.axes is None else Sharded(retriever)


def gives_scores(setting: str) -> bool:
    """Whether the retriever knows the score of every document."""
    return hasattr(parse(setting), "route_with_scores")


def need_scores(setting: str, who: str) -> None:
    """Refuse a retriever that does not know the score of every document.

    Raises:
      ConfigError: names `who` needs them, and retrievers that have them.
    """
    having = ", ".join(name for name in RETRIEVERS if gives_scores(name))
    require(
        gives_scores(setting),
        f"{who} needs the score of every document, and retriever {setting!r} scores only some: take one of {having}.",
    )
