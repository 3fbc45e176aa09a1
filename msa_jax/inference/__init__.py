"""Asking the memory: an engine that answers many questions at once, and the session that people and programs use."""

from msa_jax.importing import require_extra

require_extra("bank")  # before what needs it is imported

from msa_jax.errors import QuestionError
from msa_jax.inference.abstention import Threshold, choose_threshold
from msa_jax.inference.answer import Answer, Citation, Event, Outcome, Round, StreamEvent
from msa_jax.inference.corpus import FixedCorpus
from msa_jax.inference.engine import Engine
from msa_jax.inference.explanation import Explained, Explanation, LayerMatch
from msa_jax.inference.request import Request
from msa_jax.inference.session import Session, Stats
from msa_jax.inference.settings import AskConfig, Budget, EngineConfig, Sampling

__all__ = [
    "Answer",
    "AskConfig",
    "Budget",
    "Citation",
    "Engine",
    "EngineConfig",
    "Event",
    "Explained",
    "Explanation",
    "FixedCorpus",
    "LayerMatch",
    "Outcome",
    "Request",
    "QuestionError",
    "Round",
    "Sampling",
    "Session",
    "Stats",
    "StreamEvent",
    "Threshold",
    "choose_threshold",
]
