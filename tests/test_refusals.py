"""What ends in one sentence before any work, whatever command it is."""

import pytest

from msa_jax.cli import base
from msa_jax.data import JsonlSource
from msa_jax.errors import DataError
from msa_jax.evaluation.task import Results


def test_a_kernel_that_this_machine_cannot_run_is_a_sentence(capsys):
    def work():
        raise NotImplementedError("gpu: there is no GPU here;\ntake another implementation.")

    assert base.run("ask", work) == 1
    assert capsys.readouterr().err == "ask: gpu: there is no GPU here; take another implementation.\n"


def test_scores_have_a_folder_before_they_are_asked_for(tmp_path):
    with pytest.raises(DataError, match="--json .*: there is no folder .*; make it"):
        Results(tmp_path / "none/scores.json", {}, resumes=False)
    assert Results(tmp_path / "scores.json", {}, resumes=False).rows == []


def test_a_file_without_a_question_is_named(tmp_path):
    (tmp_path / "documents.jsonl").write_text('{"id": "1", "title": "", "text": "Rye bread is dark."}\n')
    (tmp_path / "questions.jsonl").touch()
    with pytest.raises(DataError, match="questions.jsonl has no question"):
        JsonlSource(tmp_path)
