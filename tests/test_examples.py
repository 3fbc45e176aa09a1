"""The examples run as a reader would run them, and learn."""

import importlib.util

import pytest


@pytest.mark.parametrize("name", ["embed_in_nnx", "embed_in_linen"])
def test_examples_learn(root, name, capsys):
    """The last loss is far below what guessing among the values gives, log 20 and more."""
    spec = importlib.util.spec_from_file_location(name, root / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    first, last = module.main()
    assert first > 3.5 and last < 1.2, (first, last)
    assert "step" in capsys.readouterr().out
