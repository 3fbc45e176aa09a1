"""A source is one module: what it needs become settings of a run, and nothing else knows of it."""

import sys
import textwrap

import numpy as np
import pytest
from ml_collections import ConfigDict

from msa_jax.data import DataConfig, sources
from msa_jax.errors import ConfigError
from msa_jax.runs.build import make_source, open_tokenizer
from msa_jax.runs.config import RunConfig, full_config

LETTERS = textwrap.dedent('''
    """Towns named by letters."""

    import dataclasses

    from msa_jax.data import CorpusSource, Document, Question
    from msa_jax.data.sources import SourceSettings
    from msa_jax.errors import require


    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Settings(SourceSettings):
        """Towns.

        Attributes:
          towns: how many.
        """

        towns: int = 9

        def __post_init__(self):
            require(self.towns > 1, f"data.towns must be above 1, got {self.towns}.")

        @property
        def word_pattern(self):
            return "town|."

        def texts(self, data):
            return ["town"] * 9 + [document.text for document in self.build(data, None, "train").documents]

        def build(self, data, tokenizer, split):
            names = [chr(ord("a") + i) for i in range(self.towns)]
            documents = [Document(name, "", f"town {name} of {split}") for name in names]
            return CorpusSource(documents, [Question(name, f"{name}?", (name,), (name,)) for name in names])
''')


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """One more module in the folder of sources."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "letters.py").write_text(LETTERS)
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(folder)])
    yield
    for name in ("letters", "numbers"):
        sys.modules.pop(f"msa_jax.data.sources.{name}", None)


def run_of(**data):
    config = full_config({"training": {"phases": [{"steps": 1}]}, "tokenizer": {"vocab_size": 400}})
    for name, value in data.items():
        config.data[name] = value
    return RunConfig.from_dict(config.to_dict())


def test_a_module_is_a_source(letters, tmp_path):
    config = full_config({"training": {"phases": [{"steps": 1}]}})
    assert isinstance(config, ConfigDict) and config.data.source == "needles" and config.data.towns == 9
    run = run_of(source="letters", towns=5)
    assert run.data.settings.towns == 5 and run.to_dict()["data"]["towns"] == 5
    assert RunConfig.from_dict(run.to_dict()) == run
    tokenizer = open_tokenizer(run, tmp_path, train=True)
    assert len(tokenizer.encode("town")) == 1 and len(tokenizer.encode("of")) == 2  # by the module's own pieces
    source = make_source(run.data, tokenizer, "eval")
    episode = source.episode([0, 1], 4, np.random.default_rng(0))
    assert len(episode.documents) == 4 and episode.documents[0].text.endswith("of eval")


def test_what_a_source_says_is_checked(letters):
    with pytest.raises(ConfigError, match="data.towns must be above 1, got 1"):
        run_of(source="letters", towns=1)
    with pytest.raises(ConfigError, match="babi, jsonl, letters, needles, python_docs or ruler, got 'towns'"):
        run_of(source="towns")
    with pytest.raises(ConfigError, match="data.settings are not those of 'letters'"):
        DataConfig(source="letters", settings=DataConfig().settings)


def test_settings_of_other_sources_are_passed_over_and_named(letters, caplog):
    assert run_of(source="letters", max_chars=500, num_words=256).data.settings.towns == 9
    (record,) = caplog.records
    who = "needles and python_docs and ruler"
    assert record.getMessage() == f"data.max_chars is a setting of {who}, and does nothing with data.source 'letters'"
    for source, name, value in (("needles", "hard_negatives", "file"), ("letters", "uuid_pairs", True)):
        with pytest.raises(ConfigError, match=f"data.{name} is a setting of .* does nothing with .*'{source}': leave"):
            run_of(**{"source": source, name: value})


def test_one_name_has_one_type(letters, tmp_path):
    (tmp_path / "more" / "numbers.py").write_text(LETTERS.replace("towns", "folder"))
    with pytest.raises(ConfigError, match="data.folder is <class 'str'> for babi and <class 'int'> for numbers"):
        sources.owners()
