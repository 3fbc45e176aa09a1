"""Settings can be seen: every field has a value, a type and a word of help, printed or on its page."""

import dataclasses
from typing import get_args

import pytest

from msa_jax import train
from msa_jax.inference.settings import MODES, Mode
from msa_jax.runs import settings as shown
from msa_jax.runs.config import RunConfig


def test_the_page_is_as_the_settings_are(root):
    said = "write it anew: python -m msa_jax.runs.settings > docs/settings.md"
    assert (root / "docs/settings.md").read_text() == shown.as_page(), said


def test_every_field_has_a_word_of_help_and_is_a_flag(settings):
    run = RunConfig.from_dict(settings)
    rows = {row.name: row for group in shown.groups(run) for row in group.rows}
    assert [name for name, row in rows.items() if not (row.help and row.type)] == []

    def leaves(values, path=""):
        for name, value in values.items():
            at = f"{path}.{name}".removeprefix(".")
            if isinstance(value, dict):
                yield from leaves(value, at)
            elif name == "phases":
                for i, phase in enumerate(value):
                    yield from leaves(phase, f"{at}[{i}]")
            else:
                yield at, value

    written = dict(leaves(run.to_dict()))
    assert written.keys() <= rows.keys()
    assert {name: rows[name].value for name in written} == written
    model = run.model_config(vocab_size=8)
    assert (rows["model.num_layers"].value, rows["model.router_layers"].value) == (2, model.router_layers)


def test_help_is_what_the_docstrings_say():
    @dataclasses.dataclass
    class Below:
        """One.

        Attributes:
          depth: in metres: not feet. It may
            be none.
        """

        depth: float | None

    @dataclasses.dataclass
    class Above(Below):
        """Two.

        Attributes:
          low, high: of the range; see depth. kind: what it is.
        """

        low: int
        high: int
        kind: str

    assert shown.field_help(Above) == {
        "depth": "in metres: not feet. It may be none.",
        "low": "of the range; see depth.",
        "high": "of the range; see depth.",
        "kind": "what it is.",
    }


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # within ml_collections
def test_print_config_prints_them_and_trains_nothing(capsys):
    train.main(["--config=ruler", "--config.data.num_documents=80", "--print_config"])
    lines = capsys.readouterr().out.splitlines()
    assert "  data.num_documents = 80  (int)  N of a training batch." in lines
    assert "  model.chunk_size = 16  (int)  P, tokens pooled into one chunk of the memory bank." in lines
    assert any(line.startswith("  model.num_layers = 'as in init_from'  (int)") for line in lines)
    assert any("uuid_pairs" in line for line in lines) and not any("num_words" in line for line in lines)
    with pytest.raises(SystemExit, match="--workdir is missing: name the folder of the run"):
        train.main(["--config=demo"])
    with pytest.raises(SystemExit, match="--config.model.top_k is now --config.model.top_k_documents."):
        train.main(["--config=demo", "--workdir=run", "--config.model.top_k=4"])


def test_help_names_every_mode(capsys):
    assert tuple(MODES) == get_args(Mode)
    from msa_jax import eval as evaluation
    from msa_jax.ask.__main__ import parser

    with pytest.raises(SystemExit):
        evaluation.main(["--help"])
    for text in (capsys.readouterr().out, parser().format_help()):
        assert all(f"  {mode:<12} {what}" in text for mode, what in MODES.items())
