"""A session for the command, in a terminal of 60 columns."""

import pytest

from msa_jax.ask import __main__ as command
from tests.ask import fake


@pytest.fixture
def session(monkeypatch):
    made = fake.Session()
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(command, "open_session", lambda *_: made)
    return made
