"""Python's own documentation as a source: real pairs, found by parsing alone."""

import numpy as np
import pytest

from msa_jax.data import PythonDocsSource
from msa_jax.data.corpora.python_files import package_files, read_objects, standard_library_files
from msa_jax.errors import DataError


@pytest.fixture(scope="module")
def pydocs():
    return [PythonDocsSource(split, max_chars=900_000) for split in ("train", "eval")]


def test_python_documentation_pairs(pydocs):
    train, evaluation = pydocs
    assert train.documents == evaluation.documents
    assert {q.question for q in train.questions}.isdisjoint(q.question for q in evaluation.questions)
    assert len(train) > 5 * len(evaluation) > 0
    asked = [q.question for q in train.questions + evaluation.questions]
    assert len(set(asked)) == len(asked)
    texts = {d.id: d.text for d in train.documents}
    for question in train.questions + evaluation.questions:
        (name,) = question.answers
        assert question.supporting_ids == (name,)
        assert name in texts[name]
        assert question.question not in " ".join(texts[name].split())
        assert len(texts[name]) <= 2000
    assert sum(map(len, train.passages())) >= 900_000
    assert list(train.texts()) == list(evaluation.texts()) == list(train.passages())
    assert train.episode([0, 1], 40, np.random.default_rng(0)).questions == train.questions[:2]


def test_python_documentation_is_the_same_again_and_can_hold_sources(pydocs):
    again = PythonDocsSource(max_chars=900_000)
    assert again.documents == pydocs[0].documents and again.questions == pydocs[0].questions
    with_sources = PythonDocsSource(max_chars=900_000, include_sources=True)
    assert any("\nimport " in text for text in with_sources.passages())
    assert not any("\nfrom collections import" in text for text in again.passages() if text.count("\n") < 9)
    with pytest.raises(DataError, match="'no-such-package' is not installed"):
        PythonDocsSource(packages=["no-such-package"])


def test_packages_are_found_without_their_tests():
    files = package_files(["hypothesis", "grain"])
    names = [name for name, _ in files]
    assert "hypothesis.strategies._internal.core" in names and "grain" in names
    assert names.index("hypothesis") < names.index("grain")
    assert not [name for name in names if name.endswith("_test")]
    objects = read_objects("core", dict(files)["hypothesis.strategies._internal.core"])[1]
    assert "core.sampled_from" in {o.name for o in objects}


def test_files_are_parsed_and_not_run(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(
        '"""Module text."""\nraise SystemExit("ran")\n\n'
        "def outer(a: int, *rest, key=(1, 2)) -> str:\n"
        '    r"""First \\d line.\n\n    Second."""\n    return "\\d"\n\n'
        'class Box(dict):\n    """A box."""\n    async def open(self):\n        "Opens."\n'
        '    def _hidden(self):\n        "Not listed."\n\ndef bare(): pass\n'
    )
    source, objects = read_objects("pack.odd", path)
    assert source == path.read_text()
    assert [(o.name, o.signature, o.docstring) for o in objects] == [
        ("pack.odd", "module", "Module text."),
        ("pack.odd.outer", "outer(a: int, *rest, key=(1, 2)) -> str", "First \\d line.\n\nSecond."),
        ("pack.odd.Box", "class Box(dict)", "A box."),
        ("pack.odd.Box.open", "open(self)", "Opens."),
    ]
    assert objects[1].code == 'return "\\d"'


@pytest.mark.parametrize(
    "data", [b"def (", b"\x00", b"# coding: latin-1\nx = '\xe9'\n", b"x = " + b"(" * 300]
)
def test_files_that_do_not_parse_are_passed_over(tmp_path, data):
    path = tmp_path / "bad.py"
    path.write_bytes(data)
    assert read_objects("bad", path) == ("", [])


def test_tests_are_left_out_of_the_standard_library():
    names = [name for name, _ in standard_library_files()]
    assert names == sorted(names)
    assert {"json", "json.decoder", "asyncio.events"} <= set(names)
    assert not [
        name for name in names if name.startswith(("test.", "idlelib.idle_test")) or ".tests." in name
    ]
