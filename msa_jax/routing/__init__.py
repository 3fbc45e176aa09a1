"""Routing: which documents a question reads (arXiv 2603.23516, section 3.2)."""

from msa_jax.routing.exact import document_scores, select, top_k_indices
from msa_jax.routing.query import l2_normalise, routing_key, routing_query
from pallas_kernels.chunk_scores.api import NO_SCORE

__all__ = ["NO_SCORE", "document_scores", "l2_normalise", "routing_key", "routing_query", "select", "top_k_indices"]
