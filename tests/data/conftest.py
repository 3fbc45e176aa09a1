"""A made-up haystack and tokenizers trained on it, shared by the tests of this folder."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from msa_jax.data import JsonlSource, NeedleSource, Template, Tokenizer, training_texts

SYLLABLES = ["ba", "co", "di", "fu", "ge", "li", "mo", "nu", "pa", "ro", "se", "ti"]


@pytest.fixture(scope="session")
def haystack() -> list[str]:
    """Sentences of invented words; here and there digits, quotes, line breaks, letters outside ASCII."""
    rng = random.Random(7)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))) for _ in range(90)]
    extras = ["1984", '"quoted"', "(aside)", "naïve", "東京", "don't", "x=3;"]

    def sentence() -> str:
        chosen = [rng.choice(extras if rng.random() < 0.06 else words) for _ in range(rng.randint(4, 14))]
        return " ".join(chosen).capitalize() + rng.choice([". ", ".\n", "? ", ".\n\n", ".\n    ", ".  "])

    return ["".join(sentence() for _ in range(60)).strip() for _ in range(41)]


@pytest.fixture(scope="session")
def tokenizer(haystack) -> Tokenizer:
    """Compact template, place-value ids."""
    return Tokenizer.train(training_texts(haystack, num_words=60), 900)


@pytest.fixture(scope="session")
def plain_tokenizer(haystack) -> Tokenizer:
    """The paper's template, ids as plain digits."""
    return Tokenizer.train(training_texts(haystack, num_words=60), 800, Template.paper())


@pytest.fixture(scope="session")
def words() -> list[str]:
    return [a + b for a in SYLLABLES for b in SYLLABLES][:37]


@pytest.fixture(scope="session")
def needles(haystack, words, tokenizer) -> NeedleSource:
    return NeedleSource(haystack, words, tokenizer, document_tokens=97)


@pytest.fixture(scope="session")
def write_rows() -> Callable[[Path, list], None]:
    def write(path: Path, rows: list) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    return write


@pytest.fixture(scope="session")
def write_corpus(write_rows) -> Callable[[Path, int, int], None]:
    """Writes a corpus in which question i is supported by documents i and i + 1."""

    def write(folder: Path, documents: int, questions: int) -> None:
        texts = [f"Town {i} lies on river {i * 7}. It has {i} bridges." for i in range(documents)]
        rows = [{"id": f"d{i}", "title": f"Town {i}", "text": text} for i, text in enumerate(texts)]
        asked = [
            {
                "id": f"q{i}",
                "question": f"On which river lies the town after town {i}?",
                "answers": [f"river {i * 7 + 7}", "unknown"],
                "supporting_ids": [f"d{i}", f"d{i + 1}"],
            }
            for i in range(questions)
        ]
        write_rows(folder / "documents.jsonl", rows)
        write_rows(folder / "questions.jsonl", asked)

    return write


@pytest.fixture
def corpus_folder(tmp_path, write_corpus) -> Path:
    write_corpus(tmp_path, 23, 17)
    return tmp_path


@pytest.fixture
def corpus(corpus_folder) -> JsonlSource:
    return JsonlSource(corpus_folder, eval_fraction=0.3)
