"""Scores of answers, the log of a run, and its picture."""

import json

import pytest

from msa_jax.evaluation.plots import plot_curve, token_count
from msa_jax.evaluation.scores import exact_match, f1, normalise_answer, precision_recall, string_match
from msa_jax.training.log import RunLog


def test_answers_are_normalised():
    assert normalise_answer("  The  Quick, brown-fox! ") == "quick brownfox"


@pytest.mark.parametrize(
    "prediction, answers, exact, overlap",
    [
        ("The Nile", ["nile"], 1.0, 1.0),
        ("river Nile", ["nile", "Amazon"], 0.0, 2 / 3),
        ("", ["nile"], 0.0, 0.0),
        ("1234567", ["1234568"], 0.0, 0.0),
        ("c b b", ["b b d"], 0.0, 2 / 3),
        ("the", ["an"], 1.0, 1.0),
    ],
)
def test_exact_match_and_f1(prediction, answers, exact, overlap):
    assert exact_match(prediction, answers) == exact
    assert f1(prediction, answers) == pytest.approx(overlap)


@pytest.mark.parametrize(
    "prediction, wanted, share",
    [
        ("They are 123, 456, and ABC.", ["456", "abc"], 1.0),
        ("1234567", ["1234567", "7654321", "123", "9"], 0.5),
        ("", ["1"], 0.0),
        ("anything", [], 0.0),
        ("12 34", ["1234"], 0.0),
    ],
)
def test_string_match_is_the_share_of_what_occurs(prediction, wanted, share):
    assert string_match(prediction, wanted) == share


def test_precision_and_recall_of_sets():
    assert precision_recall([1, 2, 2, 3], [2, 5]) == (pytest.approx(1 / 3), 0.5)
    assert precision_recall([], [1]) == (0.0, 0.0)
    assert precision_recall([1], []) == (0.0, 1.0)


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 2})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    log = RunLog(tmp_path, resumed_step=2)
    log.write(3, {"loss": 9.0})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 9.0}]
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    "tokens, text",
    [(16384, "16K"), (1 << 20, "1M"), (100_000_000, "100M"), (64_000_000, "64M"), (1500, "1.5K"), (12, "12")],
)
def test_token_counts_are_short(tokens, text):
    assert token_count(tokens) == text


def test_curve_is_drawn(tmp_path):
    scores = {"exact_match": 0.8, "router_recall@16": [1.0, 0.9]}
    plot_curve([{"memory_tokens": 2**n, **scores} for n in (20, 14)], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
