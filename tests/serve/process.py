"""A server of a scripted session as a process of its own: `python -m tests.serve.process GRACE [KEYS]`.

Prints its port. A question "slow" takes 1.5 s, any other is repeated; "endless" never ends.
"""

import asyncio
import logging
import os
import sys
import threading
import time

from msa_jax.inference.settings import AskConfig
from msa_jax.serve.keys import Keys
from msa_jax.serve.limits import Limits
from msa_jax.serve.running import bind, serve
from msa_jax.serve.service import Service
from tests.serve.fakes import FakeSession


class Slow(FakeSession):
    """Notices after half a second that a question was cancelled, as one that computes does."""

    def submit(self, *args, **kwargs):
        pending = super().submit(*args, **kwargs)
        cancel = pending.cancel
        pending.cancel = lambda: threading.Timer(0.5, cancel).start()
        return pending


def script(question):
    if question == "endless":
        return ["begun ", 1000.0]
    return ["begun ", 1.5, "done"] if question == "slow" else [question]


def main(grace: str, keys: str | None = None) -> None:
    logging.basicConfig(level=logging.INFO)
    service = Service(
        model="fake", defaults=AskConfig(), limits=Limits(grace=float(grace), timeout=3000.0), local=True,
        writable=True, keys=keys and Keys.load(keys),
    )  # fmt: skip
    bound = bind("127.0.0.1", 0)

    def load():
        if "FAIL" in os.environ:
            raise OSError("cannot be loaded")
        time.sleep(0.1)
        service.start(Slow(script=script, add_seconds=float(os.environ.get("ADD", 0))), 4)

    print(bound.getsockname()[1], flush=True)
    asyncio.run(serve(service, bound, load, keys))
    print("ended", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
