"""RULER's evaluation: scores, tables and shares of what is kept."""

import random
import types

import numpy as np
from benchmarks.quality import ruler, ruler_report
from flax import nnx

from msa_jax.config import MSAConfig
from msa_jax.data import Question, Renderer, RulerSource, Tokenizer
from msa_jax.data.haystacks.ruler_tasks import NOISE, TASKS
from msa_jax.data.haystacks.uuids import draw_uuids, word_pattern
from msa_jax.evaluation.grown import GrownMemory
from msa_jax.model import MSATransformer


def answer(text, named, best, outcome="answered"):
    event = lambda number: types.SimpleNamespace(kind="read", number=number)  # noqa: E731
    rounds = [types.SimpleNamespace(events=[event(n) for n in named], documents=np.array(best))]
    return types.SimpleNamespace(text=text, rounds=rounds, outcome=outcome)


def test_scores_of_an_answer():
    question = Question("q", "?", ("12, 34",), ("5", "8"), wanted=("12", "34"))
    right = ruler.score(question, answer("34, 12", [8, 5], [[5, 8, 1], [8, 1, 5]]))
    assert right["string_match"] == right["all_values"] == right["ids_exact"] == right["ids_recall"] == 1
    assert right["router_recall@n"] == [1.0, 0.5] and right["router_recall@16"] == [1.0, 1.0]
    half = ruler.score(question, answer("the 12", [5, 9], [[5, 8], [1, 2]], "cut"))
    assert (half["string_match"], half["all_values"], half["ids_exact"], half["ids_recall"]) == (0.5, 0, 0, 0.5)
    assert half["answered"] == 0
    mean = ruler.means([right, half])
    assert mean["string_match"] == 0.75 and mean["router_recall@n"] == [1.0, 0.25]


def test_tables_have_the_mean_and_what_is_kept_of_it(tmp_path):
    scores = {"niah_single_1": (1.0, 0.9, 0.8), "niah_multivalue": (0.5, 0.3, None)}
    sizes = (2**15, 2**17, 10**7)
    rows = [
        {"task": task, "memory_tokens": size, "mode": "generate", "string_match": value}
        for task, values in scores.items()
        for size, value in zip(sizes, values, strict=True)
        if value is not None
    ]
    lines = ruler_report.table(rows).splitlines()
    assert lines[0] == "| task | 32K | 128K | 10M |"
    assert lines[2] == "| `niah_single_1` | 1.000 | 0.900 | 0.800 |"
    assert lines[3] == "| `niah_multivalue` | 0.500 | 0.300 |  |"
    assert lines[4] == "| mean | 0.750 | 0.600 |  |"
    assert lines[5] == "| kept of 32K | 1.000 | 0.800 |  |"
    assert len(lines) == 6 and set(scores) < set(TASKS)
    rows += [row | {"mode": "router", "string_match": 0.1} for row in rows[:2]]
    ruler_report.plot(rows, tmp_path / "a" / "b.png")
    assert (tmp_path / "a" / "b.png").stat().st_size > 1000


def test_the_haystack_behind_a_memory_has_the_tokens_asked_for(tmp_path, monkeypatch):
    # So little text that it is gone through many times, each time in shorter documents.
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(60)]
    texts = [" ".join(rng.choices(words, k=400)) + "." for _ in range(8)]
    texts_of_all = [*texts, NOISE, *draw_uuids(np.random.default_rng(0), 2000)]
    spoken = Tokenizer.train(texts_of_all, 700, word_pattern=word_pattern())
    source = RulerSource(texts, spoken, document_tokens=300, split="eval", eval_fraction=0.5)
    renderer = Renderer(spoken, 300)
    config = MSAConfig(
        vocab_size=spoken.vocab_size, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=8
    )
    model = MSATransformer(config, rngs=nnx.Rngs(0))
    monkeypatch.setattr(ruler, "_LARGEST", 24_000)
    run = types.SimpleNamespace(evaluation=types.SimpleNamespace(rows_per_step=4))
    options = types.SimpleNamespace(seed=3, questions=2)
    filled, fill = [], GrownMemory.fill

    def filling(self, *args, **options):
        filled.append(self.folder.name)
        fill(self, *args, **options)

    monkeypatch.setattr(GrownMemory, "fill", filling)

    def memories(largest):
        del filled[:]
        return ruler.Memories(run, model, renderer, source, [4000, largest], tmp_path, options, {})

    memory, behind = memories(24_000).of("niah_multivalue")
    assert memory.tokens <= 4000 and 24_000 <= memory.tokens + behind.tokens < 27_000
    numbers = np.concatenate([memory.numbers[: memory.done], behind.numbers[: behind.done]])
    assert len(set(numbers.tolist())) == len(numbers)
    assert filled == ["niah_multivalue", "behind_niah_single_2"]
    # What there is already is not made again.
    again = memories(12_000)
    assert [m.tokens for m in again.of("niah_multivalue")] == [memory.tokens, behind.tokens] and not filled
    again.of("niah_single_2")
    assert filled == ["niah_single_2"]
