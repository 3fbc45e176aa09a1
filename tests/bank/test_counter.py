"""The counter of a bank's texts: no ordinal is given twice, whoever takes some, stops, is killed, and goes on."""

import concurrent.futures
import contextlib
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msa_jax.bank.numbers import Numbers, next_of
from msa_jax.bank.table import BankDocument
from msa_jax.errors import BankError
from tests.bank import faults
from tests.bank.drawn import create
from tests.bank.object_store import serving
from tests.bank.test_ingest_and_load import encoder_of
from tests.bank.test_numbers import numbers_of

steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 3), st.integers(0, 40)),
        st.tuples(st.sampled_from(["commit", "give back", "stop"]), st.integers(0, 3), st.integers(0, 40)),
    ),
    max_size=25,
)


@settings(max_examples=60)
@example([("take", 2, 5), ("commit", 2, 3), ("stop", 2, 0), ("take", 2, 3), ("take", 0, 3), ("take", 2, 9)])
@given(steps)
def test_no_ordinal_is_given_twice_whoever_takes_stops_and_goes_on(tmp_path_factory, steps):
    """0 and 1 add to the bank, 2 and 3 are parts."""
    bank = tmp_path_factory.mktemp("bank")
    parts = {i: tmp_path_factory.mktemp("part") for i in (2, 3)}
    committed = {i: [] for i in range(4)}
    start = lambda i: Numbers(  # noqa: E731
        bank, 1 + max(committed[0] + committed[1], default=0), part=parts.get(i), after=max(committed[i], default=0)
    )
    holders, pending = {i: start(i) for i in range(4)}, {i: [] for i in range(4)}
    for what, i, count in steps:
        if what == "take":
            taken = holders[i].take(count)
            assert len(taken) == count and taken == sorted(set(taken))
            assert not pending[i] or not taken or taken[0] > pending[i][-1]
            assert not set(taken) & set(itertools.chain(*committed.values(), *pending.values()))
            pending[i] += taken
        elif what == "commit":
            committed[i] += pending[i][:count]
            pending[i] = pending[i][count:]
        else:
            if i < 2 and what == "give back":
                holders[i].give_back(1 + max(committed[i], default=0))
            again, holders[i] = pending[i], start(i)
            pending[i] = []
            if i >= 2 and again:
                # What a part had not committed it gives again, to the same texts.
                pending[i] = holders[i].take(len(again))
                assert pending[i] == again
    everything = list(itertools.chain(*committed.values(), *pending.values()))
    assert next_of(bank) > max(everything, default=0)


def test_claims_are_few_and_waste_little(tmp_path, monkeypatch):
    numbers, claims = Numbers(tmp_path, 1), []
    claim = numbers.claim
    monkeypatch.setattr(numbers, "claim", lambda count: claims.append(count) or claim(count))
    for _ in range(300):
        numbers.take(64)
    assert len(claims) < 50 and sum(claims) < 300 * 64 * 1.13
    numbers.give_back(19_001)
    assert next_of(tmp_path) == 19_001


@pytest.mark.parametrize("place", ["folder", "gs"])
def test_many_take_at_once(place, tmp_path, monkeypatch):
    with serving(monkeypatch) if place == "gs" else contextlib.nullcontext():
        bank = "gs://bucket/bank" if place == "gs" else tmp_path

        def run(_):
            numbers = Numbers(bank, 1)
            return [n for _ in range(15) for n in numbers.take(3)]

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            taken = sorted(itertools.chain(*pool.map(run, range(4))))
        assert len(set(taken)) == 4 * 15 * 3 and next_of(bank) > taken[-1]


def keep_taking(path, pipe):
    while True:
        pipe.send(Numbers(path, 1).take(2))


def test_kill_9_while_taking_leaves_a_counter_that_goes_on(tmp_path):
    seen = []
    for i in range(6):
        here, there = faults.context.Pipe()
        process = faults.context.Process(target=keep_taking, args=(tmp_path, there))
        process.start()
        for _ in range(3 + i):
            assert here.poll(60)
            seen += here.recv()
        process.kill()
        process.join()
        while here.poll():
            with contextlib.suppress(EOFError):
                seen += here.recv()
                continue
            break
    (tmp_path / "NUMBERS.__lock").write_bytes(b"half written")
    with create(tmp_path) as store:  # clears away what is half written, save that of the counter
        assert (tmp_path / "NUMBERS.__lock").exists()
        store.add([BankDocument("a", "a")], encoder_of())
        seen.append(numbers_of(store)["a"])
    assert seen == sorted(set(seen)) and next_of(tmp_path) > seen[-1]


def test_a_damaged_counter_is_named(tmp_path):
    with create(tmp_path) as store:
        store.add([BankDocument("a", "a")], encoder_of())
        whole = (tmp_path / "NUMBERS").read_bytes()
        for bad in (whole.replace(b"2", b"3", 1), whole[:-4], b"", b"x" * len(whole)):
            (tmp_path / "NUMBERS").write_bytes(bad)
            for call in (store.verify, lambda: store.add([BankDocument("b", "b")], encoder_of())):
                with pytest.raises(BankError, match="NUMBERS is damaged: delete it while nothing is being added"):
                    call()
        (tmp_path / "NUMBERS").unlink()
        store.add([BankDocument("b", "b")], encoder_of())
        assert numbers_of(store) == {"a": 1, "b": 2}
