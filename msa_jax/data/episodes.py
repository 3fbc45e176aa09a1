"""From an episode to the samples of a batch: which part of each question's chain is trained on, and what it sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from msa_jax.data.batch import Sample
from msa_jax.data.records import Document, Episode, Question
from msa_jax.data.samples import Renderer

SampleForm = Literal["chain", "at_once", "steps", "question", "latent"]


@dataclass(frozen=True)
class RenderedEpisode:
    """Token lists of N documents and B samples; `visible` and `relevant` as in `QuestionBatch`, bool [B, N]."""

    documents: list[list[int]]
    samples: list[Sample]
    visible: np.ndarray
    relevant: np.ndarray


def render_episode(
    renderer: Renderer,
    episode: Episode,
    rng: np.random.Generator,
    *,
    samples: SampleForm = "chain",
    unanswerable: float = 0.0,
    label_fraction: float = 1.0,
) -> RenderedEpisode:
    """Render an episode, one sample a question.

    "chain" is the whole reply, routed once by the question; all its supporting documents are relevant. So is
    "at_once", which names them all in its first turn, by what the question alone has routed to. "steps" is one
    step of the chain, drawn anew whenever the question comes up, each of the n + 1 as likely (paper section 3.5:
    a multi-hop chain is trained on one retrieval at a time). Relevant is the document wanted next alone. In the last
    step none is: nothing is left to find, and to call any document right there would teach the newest text to find
    it in the steps before as well. Such a sample has no router loss. "question" is the question without a reply: the
    router alone learns. "latent" reads no document's text: retrieval ends at once and the answer comes from pooled
    memory alone, as in the engine's mode of that name.

    Args:
      samples: the form.
      unanswerable: share of samples, drawn at random, that do not see their supporting documents. Their reply is
        `Renderer.refusal`, and they have no router loss.
      label_fraction: share of samples, drawn at random, whose relevant documents are told. The others have no router
        loss, and learn to route from their reply alone.
    """
    documents = [renderer.render_document(d, n) for d, n in zip(episode.documents, episode.numbers, strict=True)]
    place = episode.index_of()
    shape = (len(episode.questions), len(documents))
    visible = np.ones(shape, bool) if episode.visible is None else episode.visible.copy()
    relevant, rendered = np.zeros(shape, bool), []
    for i, question in enumerate(episode.questions):
        found = [place[d] for d in question.supporting_ids]
        supporting = [(episode.documents[j], episode.numbers[j]) for j in found]
        # Nothing is drawn for what is off, so that a seed gives the batches that it gives without it.
        if unanswerable and rng.random() < unanswerable:
            visible[i, found] = False
            rendered.append(renderer.refusal(question))
        elif samples == "steps":
            read = int(rng.integers(len(found) + 1))
            relevant[i, found[read : read + 1]] = True
            rendered.append(renderer.step(question, supporting, read))
        elif samples == "question":
            relevant[i, found] = True
            rendered.append(renderer.question(question))
        else:
            relevant[i, found] = True
            supporting = [] if samples == "latent" else supporting
            rendered.append(renderer.sample(question, supporting, at_once=samples == "at_once"))
    if label_fraction < 1:
        relevant &= rng.random(len(relevant))[:, None] < label_fraction
    return RenderedEpisode(documents, rendered, visible, relevant)


def longest_sample(
    renderer: Renderer,
    question: Question,
    supporting: Sequence[Document],
    *,
    samples: SampleForm = "chain",
    unanswerable: bool = False,
) -> int:
    """Tokens of the longest sample that `render_episode` makes of a question: a step is never longer than its chain."""
    if samples == "question":
        length = len(renderer.question(question).tokens)
    else:
        length = len(renderer.sample(question, [(document, 0) for document in supporting]).tokens)
    return max(length, len(renderer.refusal(question).tokens)) if unanswerable else length
