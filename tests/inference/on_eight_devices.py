"""A session of a bank that is spread over a mesh; test_engine_tiers.py runs this where there are eight devices."""

import jax
from flax import nnx

from msa_jax.bank import MemoryStore
from msa_jax.inference import AskConfig, Session
from msa_jax.sharding import MeshConfig, Shardings
from tests.inference.small import ASK, BUDGET, QUESTIONS, encoder, model_of, renderer
from tests.inference.test_engine_tiers import TWO, alike, path

__all__ = ["path"]


def test_a_spread_bank_answers_as_one_device(path):  # noqa: F811
    mesh = MeshConfig(data=2, memory=2, model=2).make()
    graphdef, params = nnx.split(model_of())
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    spread = nnx.merge(graphdef, params)
    spread.shardings = Shardings.inference()
    compiled = [0]

    def count(event, duration, **_):
        compiled[0] += "backend_compile" in event

    jax.monitoring.register_event_duration_secs_listener(count)
    read = AskConfig(mode="router", router_documents=2, budget=BUDGET)
    found = []
    for parts, loading in ((model_of(), {}), (spread, dict(mesh=mesh))):
        store = MemoryStore(path)
        with Session(
            parts, renderer().tokenizer, store, encoder=encoder(), engine=TWO, defaults=ASK, loading=loading
        ) as session:  # fmt: skip
            session.warm_up()
            before = compiled[0]
            found.append([
                answer
                for config in (ASK, read) for namespaces in (None, ["few"])
                for answer in session.ask_many(QUESTIONS[:3], config=config, namespaces=namespaces)
            ])  # fmt: skip
            assert compiled[0] == before > 0
    alike(found[1], found[0], atol=1e-5)
