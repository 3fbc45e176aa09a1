"""What a retriever is: all that the model and its layers know of retrieval.

Sizes: B questions, T routing tokens, M router width, N documents, k documents selected.
"""

from __future__ import annotations

from typing import Protocol

import jax
from flax import struct

from msa_jax.memory.bank import LayerMemory
from msa_jax.memory.selection import Selection


@struct.dataclass
class Query:
    """What a router layer asks with.

    Attributes:
      vectors: [B, T, M] float, of `routing_query`.
      route: [B, T] bool, True where a token routes.
    """

    vectors: jax.Array
    route: jax.Array


class Retriever(Protocol):
    """Chooses the documents that questions read in one router layer.

    A retriever is a frozen dataclass, so that it can be static in what is compiled. Its fields are its settings;
    one of them is `implementation`, of the operations of `pallas_kernels`.
    """

    def route(self, query: Query, memory: LayerMemory, visible: jax.Array | None, k: int) -> Selection:
        """The best min(k, N) documents of each question, [B, min(k, N)] fields, with their scores.

        Args:
          query: what is asked.
          memory: routing keys, layout and, with stacked keys, the layer to read.
          visible: [B, N] bool, documents that a question may see; None for all.
          k: documents to select.
        """


class ScoringRetriever(Retriever, Protocol):
    """A retriever that also knows the score of every document, for those who ask for them by name."""

    def route_with_scores(
        self, query: Query, memory: LayerMemory, visible: jax.Array | None, k: int
    ) -> tuple[jax.Array, Selection]:
        """Scores [B, N] float32, `NO_SCORE` where a document is absent or not visible, and what `route` gives.

        Gradients reach the scores, and through them the selection's; none passes the choice.
        """
