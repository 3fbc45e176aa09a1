"""What tests of asking have in common."""

import contextlib

import pytest

from msa_jax.bank import MemoryStore
from msa_jax.inference import Session
from tests.inference.sessions import BASE, SINGLE
from tests.inference.small import ASK, encoder, model_of, renderer


@pytest.fixture
def opened(tmp_path):
    """Makes sessions of a bank on disk; `room` and so on are options of loading."""
    with contextlib.ExitStack() as stack:

        def make(documents=BASE, writable=True, name="bank", engine=SINGLE, **loading):
            path = tmp_path / name
            if not path.exists():
                with MemoryStore.create(path, encoder().spec) as store:
                    store.add(documents, encoder())
            store = MemoryStore(path, writable=writable)
            session = Session(
                model_of(), renderer().tokenizer, store, encoder=encoder(), engine=engine, defaults=ASK,
                loading=dict(room=2.0) | loading,
            )  # fmt: skip
            return stack.enter_context(session)

        yield make
