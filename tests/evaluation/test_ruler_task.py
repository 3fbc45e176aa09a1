"""RULER's evaluation: scores, memories that share a haystack, tables and shares of what is kept."""

import random
import types

import numpy as np
import pytest
from flax import nnx

from msa_jax.bank import MemoryStore
from msa_jax.bank.table import NAMESPACE, TOKENS
from msa_jax.config import MSAConfig
from msa_jax.data import Question, Renderer, RulerSource, Tokenizer
from msa_jax.data.haystacks.ruler_tasks import NOISE, TASKS
from msa_jax.data.haystacks.uuids import draw_uuids, word_pattern
from msa_jax.evaluation.grown import grown_bank
from msa_jax.evaluation.report import table
from msa_jax.evaluation.scores import answer_scores, means
from msa_jax.evaluation.task import Inputs, Results
from msa_jax.evaluation.tasks import ruler
from msa_jax.model import MSATransformer
from msa_jax.runs.config import RunConfig


def answer(text, named, best, outcome="answered"):
    events = [types.SimpleNamespace(kind="read", number=number) for number in named]
    rounds = [types.SimpleNamespace(documents=np.array(best))]
    return types.SimpleNamespace(text=text, events=events, rounds=rounds, outcome=outcome)


def test_scores_of_an_answer():
    question = Question("q", "?", ("12, 34",), ("5", "8"), wanted=("12", "34"))
    right = answer_scores(question, {5, 8}, answer("34, 12", [8, 5], [[5, 8, 1], [8, 1, 5]]))
    assert right["string_match"] == right["all_values"] == right["id_exact_match"] == right["id_recall"] == 1
    assert right["router_recall@n"] == [1.0, 0.5] and right["router_recall@16"] == [1.0, 1.0]
    half = answer_scores(question, {5, 8}, answer("the 12", [5, 9], [[5, 8], [1, 2]], "cut"))
    assert [half[name] for name in ("string_match", "all_values", "id_exact_match", "id_recall")] == [0.5, 0, 0, 0.5]
    assert half["answered"] == 0
    mean = means([right, half])
    assert mean["string_match"] == 0.75 and mean["router_recall@n"] == [1.0, 0.25]


def test_rows_become_a_table_a_mean_and_a_picture(tmp_path):
    scores = {"niah_single_1": (1.0, 0.9, 0.8), "niah_multivalue": (0.5, 0.3, None)}
    rows = [
        {"task": task, "memory_tokens": size, "mode": "generate", "string_match": value}
        for task, values in scores.items()
        for size, value in zip((2**15, 2**17, 10**7), values, strict=True)
        if value is not None
    ]
    assert "| `niah_single_1` | generate | 131,072 | 0.900 |" in table(rows, ruler.COLUMNS)
    assert ruler.averages(rows) == pytest.approx({2**15: 0.75, 2**17: 0.6})
    rows += [row | {"mode": "router", "string_match": 0.1} for row in rows[:2]]
    ruler.draw(rows, tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 1000 and set(scores) < set(TASKS)


@pytest.fixture
def inputs(tmp_path):
    """A source of so little text that it is gone through many times, each time in shorter documents."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(60)]
    texts = [" ".join(rng.choices(words, k=400)) + "." for _ in range(8)]
    texts_of_all = [*texts, NOISE, *draw_uuids(np.random.default_rng(0), 2000)]
    spoken = Tokenizer.train(texts_of_all, 700, word_pattern=word_pattern())
    config = MSAConfig(
        vocab_size=spoken.vocab_size, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=8
    )
    data = {"source": "ruler", "document_len": 300, "question_len": 160}
    run = RunConfig.from_dict(
        {"data": data, "training": {"phases": [{"steps": 1}]},
         "evaluation": {"batch_size": 2, "rows_per_step": 4, "max_new_tokens": 16, "max_rounds": 1}}
    )  # fmt: skip

    def make(*sizes, **own):
        settings = ruler.Settings(questions=2, seed=3, first=4000, largest=24_000, **own)
        made = Inputs(
            sizes, settings, Results(tmp_path / "rows.json", {}, resumes=True), run=run,
            model=MSATransformer(config, rngs=nnx.Rngs(0)), renderer=Renderer(spoken, 300), memory=tmp_path / "memory",
        )  # fmt: skip
        made.__dict__["source"] = RulerSource(texts, spoken, document_tokens=300, split="eval", eval_fraction=0.5)
        return made

    return make


@pytest.mark.slow
def test_tasks_share_the_haystack_behind_their_memories(inputs, monkeypatch):
    filled, append = [], MemoryStore.append

    def appending(self, documents, *encoded):
        filled.append(documents[0].namespace)
        return append(self, documents, *encoded)

    monkeypatch.setattr(MemoryStore, "append", appending)
    ruler.run(inputs(4000, 24_000, tasks=("niah_multivalue",), modes=("router",)))
    assert set(filled) == {"niah_multivalue", "behind_niah_single_2"}
    del filled[:]
    asked = inputs(12_000, tasks=("niah_multivalue", "niah_single_2"), modes=("router",))
    ruler.run(asked)
    assert set(filled) == {"niah_single_2"}  # what there is already is not made again
    rows = asked.results.rows
    assert [(row["task"], row["memory_tokens"]) for row in rows] == [
        ("niah_multivalue", 4000), ("niah_multivalue", 24_000), ("niah_multivalue", 12_000), ("niah_single_2", 12_000)
    ]  # fmt: skip
    for row in rows:
        assert 0.9 * row["memory_tokens"] < row["tokens"] <= row["memory_tokens"] and row["questions"] == 2
        assert 0 <= row["string_match"] <= 1 and row["documents"] > 0
    with MemoryStore(grown_bank(asked, {"questions": 2, "seed": 3, "first": 4000, "largest": 24_000}).path) as store:
        behind = store.table.columns[:, NAMESPACE] == store.table.namespaces.index("behind_niah_single_2")
        assert 20_000 <= store.table.columns[behind, TOKENS].sum() < 27_000
