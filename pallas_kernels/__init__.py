"""The two operations that Memory Sparse Attention spends its time in. They know arrays only."""

from pallas_kernels.chunk_scores.api import chunk_scores
from pallas_kernels.gather_attention.api import gather_attention, merge

__all__ = ["chunk_scores", "gather_attention", "merge"]
