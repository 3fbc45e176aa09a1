"""Routing: which documents a question reads (arXiv 2603.23516, section 3.2). One file a retriever."""

from msa_jax.routing.exact import document_scores, select, top_k_indices
from msa_jax.routing.interface import Query, Retriever, ScoringRetriever
from msa_jax.routing.query import averaged, l2_normalise, routing_key, routing_query
from msa_jax.routing.registry import RETRIEVERS, gives_scores, need_scores, parse, retriever_of
from pallas_kernels.chunk_scores.api import NO_SCORE

__all__ = [
    "NO_SCORE",
    "RETRIEVERS",
    "Query",
    "Retriever",
    "ScoringRetriever",
    "averaged",
    "document_scores",
    "gives_scores",
    "l2_normalise",
    "need_scores",
    "parse",
    "retriever_of",
    "routing_key",
    "routing_query",
    "select",
    "top_k_indices",
]
