"""Ways to ask a trained model the same questions: how it retrieves, who retrieves in its place, and on which bank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import bm25s
import numpy as np

from benchmarks.quality.bm25 import rank
from msa_jax.bank.quantization import quantize
from msa_jax.data import Renderer
from msa_jax.errors import ConfigError
from msa_jax.evaluation.evaluate import means, score
from msa_jax.evaluation.memories import Memory
from msa_jax.inference import Answer, AskConfig, Budget, Engine, EngineConfig, FixedLibrary
from msa_jax.inference.settings import Mode
from msa_jax.memory import MemoryBank
from msa_jax.model import MSATransformer
from msa_jax.runs.open import reconfigured

Retriever = Literal["router", "bm25", "supporting", "random"]
_CONTEXT_MULTIPLE = 64
_REPORTED = 16


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to ask.

    Attributes:
      mode: as in `AskConfig`.
      rounds: how often a question may retrieve when the model names documents.
      retriever: who chooses the document that is read in mode "router".
      bank: what the model attends to: the bank, the bank with int8 routing keys or all of it in int8, or "none".
      top_k: documents selected in every router layer, if not as many as in training.
    """

    mode: Mode = "generate"
    rounds: int = 2
    retriever: Retriever = "router"
    bank: Literal["full", "int8 keys", "int8", "none"] = "full"
    top_k: int | None = None


WAYS: dict[str, Way] = {
    "generate": Way(),
    "constrained": Way(mode="constrained"),
    "router": Way(mode="router"),
    "no interleave": Way(rounds=1),
    "latent": Way(mode="latent"),
    "BM25 reader": Way(mode="router", retriever="bm25", bank="none"),
    "BM25 and bank": Way(mode="router", retriever="bm25"),
    "oracle reader": Way(mode="router", retriever="supporting", bank="none"),
    "oracle and bank": Way(mode="router", retriever="supporting"),
    "random reader": Way(mode="router", retriever="random", bank="none"),
    "random and bank": Way(mode="router", retriever="random"),
    "no context": Way(mode="latent", bank="none"),
    "int8 keys": Way(bank="int8 keys"),
    "int8": Way(bank="int8"),
    "k 1": Way(top_k=1),
    "k 4": Way(top_k=4),
    "k 8": Way(top_k=8),
    "k 32": Way(top_k=32),
}


def find_way(name: str) -> Way:
    """Raises ConfigError for an unknown name."""
    if name not in WAYS:
        raise ConfigError(f"No way to ask {name!r}; there are {', '.join(WAYS)}.")
    return WAYS[name]


def bm25_numbers(memory: Memory, *, count: int, whole_keys: bool = False) -> list[list[int]]:
    """The `count` best documents for every question by BM25 over their texts, numbers best first.

    Words that every question has are left out of the questions: they tell none from another, and where documents seldom
    hold them they outweigh a key. There are no other stop words, since keys may be made of them. With `whole_keys` a
    key like `left-match` is one word, which tells a searcher what a reader would have to know: that the order of its
    parts matters.
    """
    pattern = r"(?u)[\w-]+" if whole_keys else r"(?u)\b\w+\b"

    def split(texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(texts, stopwords=None, token_pattern=pattern, return_ids=False, show_progress=False)

    asked = split([question.question for question in memory.questions])
    frame = set.intersection(*map(set, asked)) if len(asked) > 1 else set()
    asked = [[word for word in words if word not in frame] for words in asked]
    found = rank(split([memory.originals[n].text for n in memory.numbers]), asked, count)
    return [[memory.numbers[place] for place in row] for row in found]


def recall(found: Sequence[Sequence[int]], memory: Memory, n: int) -> float:
    """Mean share of the supporting documents among the first n."""
    wanted = [{memory.numbers[memory.place[i]] for i in q.supporting_ids} for q in memory.questions]
    return float(np.mean([len(w & set(f[:n])) / len(w) for w, f in zip(wanted, found, strict=True)]))


def given_documents(retriever: Retriever, memory: Memory, seed: int) -> list[tuple[int, ...]]:
    """Documents that are read instead of the router's, for every question; empty for the router's."""
    if retriever == "bm25":
        return [tuple(row) for row in bm25_numbers(memory, count=1)]
    if retriever == "supporting":
        return [tuple(memory.numbers[memory.place[i]] for i in q.supporting_ids) for q in memory.questions]
    if retriever == "random":
        drawn = np.random.default_rng(seed).integers(0, len(memory.numbers), len(memory.questions))
        return [(memory.numbers[place],) for place in drawn]
    return [()] * len(memory.questions)


def answers(
    model: MSATransformer,
    renderer: Renderer,
    bank: MemoryBank | None,
    memory: Memory,
    way: Way,
    *,
    slots: int = 32,
    turn_tokens: int = 24,
    seed: int = 0,
) -> list[Answer]:
    """Free-running answers to the questions of a memory, in their order.

    Args:
      bank: of the documents of `memory`; not read if the way has none.
      slots: questions that are computed together.
      turn_tokens: that the model may write in a turn, and as an answer.
      seed: of random documents.
    """
    if way.top_k is not None:
        model = reconfigured(model, top_k=way.top_k)
    bank = None if way.bank == "none" else bank
    if way.bank.startswith("int8"):
        bank = quantize(bank, content=way.bank == "int8")
    texts = [question.question for question in memory.questions]
    document = renderer.document_overhead + max(len(renderer.body(d)) for d in memory.originals.values())
    longest = max(len(renderer.prompt(q)[0]) + len(renderer.restated(q)) for q in texts)
    context = longest + way.rounds * (document + 2 * turn_tokens) + 2 * turn_tokens
    context = -(-context // _CONTEXT_MULTIPLE) * _CONTEXT_MULTIPLE
    library = FixedLibrary(bank, {number: memory.originals[number] for number in memory.numbers})
    # Few lengths: each is compiled, and contexts are short.
    shapes = EngineConfig(slots=slots, context=context, lengths=(32, 128), reported_documents=_REPORTED)
    engine = Engine(model, renderer, library, shapes)
    budget = Budget(rounds=way.rounds, turn_tokens=turn_tokens, answer_tokens=turn_tokens)
    pending = [
        engine.submit(text, config=AskConfig(mode=way.mode, budget=budget, given_documents=given))
        for text, given in zip(texts, given_documents(way.retriever, memory, seed), strict=True)
    ]
    while engine.step():
        pass
    return [one.result() for one in pending]


def scores(memory: Memory, told: Sequence[Answer]) -> dict[str, Any]:
    """Means over the questions; see docs/evaluation.md. Recall is left out where nothing routed."""
    row = means([one for _, one in score(memory, range(len(told)), told)])
    return {name: value for name, value in row.items() if value != []}
