"""Answer questions over HTTP, in the form of OpenAI's chat completions (docs/serving.md).

    python -m msa_jax.serve --workdir RUN --bank DIR        or --checkpoint FOLDER

SIGTERM or SIGINT: nothing new is taken, what runs has --grace seconds to end, a second signal ends that too; then exit
status 0. SIGHUP reads --keys again. Exit status 1: refused with one sentence; 2: usage.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import pathlib
import sys
import threading
from collections.abc import Sequence

from msa_jax.importing import exit_without

exit_without("serve", "serve")  # before what needs it is imported

from msa_jax.cli.base import run
from msa_jax.cli.loading import add_flags, changes_of, loading_of
from msa_jax.errors import ConfigError, require
from msa_jax.inference.session import Session
from msa_jax.inference.settings import MODES, AskConfig, Budget, EngineConfig, Sampling, modes_help
from msa_jax.serve.keys import Keys
from msa_jax.serve.limits import Limits
from msa_jax.serve.running import bind, serve
from msa_jax.serve.service import Service

log = logging.getLogger("msa_jax.serve")

# For the session to close; it has nothing to do any more.
_CLOSE_SECONDS = 10.0


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m msa_jax.serve", description=__doc__, epilog=f"modes of asking:\n{modes_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    limits, engine, budget = Limits(), EngineConfig(), Budget()
    model = root.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", default="", help="folder of the trained run whose model answers")
    model.add_argument("--checkpoint", default="", help="or a folder in the published layout, its tokenizer within")
    root.add_argument("--bank", required=True, metavar="DIR", help="the bank, made by `python -m msa_jax.bank`")
    root.add_argument("--writable", action="store_true", help="documents may be added, changed and deleted")
    root.add_argument("--row_len", type=int, help="tokens of the longest document to add; default as trained, or 4096")
    root.add_argument("--model_name", help="what clients call the model; default the name of its folder")

    where = root.add_argument_group("who is served")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on; default %(default)s")
    where.add_argument("--port", type=int, default=8000, help="default %(default)s; 0 takes a free one")
    where.add_argument("--keys", metavar="FILE", help="API keys, made by `python -m msa_jax.serve.keys`")
    where.add_argument("--open", action="store_true", help="without keys, serve others than this machine too")

    most = root.add_argument_group("limits")
    most.add_argument("--max_body", type=int, default=limits.body, help="bytes of a request; default %(default)s")
    most.add_argument("--body_timeout", type=float, default=limits.body_seconds, help="seconds; default %(default)s")
    most.add_argument("--max_requests", type=int, default=limits.requests, help="at once; default %(default)s")
    most.add_argument("--max_waiting", type=int, default=limits.waiting, help="questions; default %(default)s")
    most.add_argument("--max_writes", type=int, default=limits.writes, help="at once; default %(default)s")
    most.add_argument("--timeout", type=float, default=limits.timeout, help="of a question; default %(default)s s")
    most.add_argument("--grace", type=float, default=limits.grace, help="seconds to end in; default %(default)s")

    shapes = root.add_argument_group("the engine")
    shapes.add_argument("--slots", type=int, default=engine.slots, help="questions together; default %(default)s")
    shapes.add_argument("--context", type=int, default=engine.context, help="tokens a question; default %(default)s")
    shapes.add_argument("--decode_steps", type=int, default=engine.decode_steps, help="default %(default)s")
    add_flags(root)

    ask = root.add_argument_group("how a question is asked that does not say so")
    ask.add_argument("--mode", choices=MODES, default="generate", help="default %(default)s")
    ask.add_argument("--temperature", type=float, default=0.0, help="default %(default)s")
    ask.add_argument("--rounds", type=int, default=budget.rounds, help="default %(default)s")
    ask.add_argument("--documents", type=int, default=budget.documents, help="default %(default)s")
    ask.add_argument("--router_documents", type=int, default=AskConfig().router_documents, help="default %(default)s")
    ask.add_argument("--answer_tokens", type=int, default=budget.answer_tokens, help="default %(default)s")
    ask.add_argument("--abstain_below", type=float, help="router score below which the answer is not in memory")
    return root


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_service(options: argparse.Namespace) -> tuple[Service, EngineConfig]:
    """What the flags ask for, still without a session.

    Raises:
      ConfigError: one sentence.
    """
    require(options.row_len is None or options.row_len > 0, f"--row_len must be above 0, got {options.row_len}.")
    require(0 <= options.port < 1 << 16, f"--port must be from 0 to 65535, got {options.port}.")
    local = options.keys is None and not options.open
    if local and not is_loopback(options.host):
        raise ConfigError(f"--host {options.host} lets others in, and everybody could read: give --keys or --open.")
    limits = Limits(
        body=options.max_body, body_seconds=options.body_timeout, requests=options.max_requests,
        waiting=options.max_waiting, writes=options.max_writes, timeout=options.timeout, grace=options.grace,
    )  # fmt: skip
    engine = EngineConfig(slots=options.slots, context=options.context, decode_steps=options.decode_steps)
    defaults = AskConfig(
        mode=options.mode, sampling=Sampling(temperature=options.temperature), abstain_below=options.abstain_below,
        budget=Budget(rounds=options.rounds, documents=options.documents, answer_tokens=options.answer_tokens),
        router_documents=options.router_documents, timeout=options.timeout,
    )  # fmt: skip
    model = options.model_name or pathlib.Path(options.workdir or options.checkpoint).resolve().name
    keys = None if options.keys is None else Keys.load(options.keys)
    return Service(
        model=model, bank=options.bank, defaults=defaults, limits=limits, keys=keys, local=local,
        writable=options.writable,
    ), engine  # fmt: skip


def _show_log() -> None:
    """Print this package's log lines to stderr, and of others what goes wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (("msa_jax", logging.INFO), ("uvicorn", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module."""
    options = parser().parse_args(arguments)
    return run("serve", lambda: _serve(options))


def _serve(options: argparse.Namespace) -> None:
    service, engine = make_service(options)
    changes = changes_of(options)
    bound = bind(options.host, options.port)

    _show_log()

    def load():
        session = Session.open(
            options.bank, workdir=options.workdir, checkpoint=options.checkpoint, engine=engine,
            defaults=service.defaults, writable=options.writable, row_len=options.row_len,
            loading=loading_of(options), changes=changes,
        )  # fmt: skip
        log.info("loaded; compiling")
        session.warm_up()
        service.start(session, engine.slots)
        log.info("ready")

    asyncio.run(serve(service, bound, load, options.keys))
    if service.session is not None:
        closing = threading.Thread(target=service.session.close, daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
    log.info("stopped")


def program() -> None:
    """The command, and the end of the process whatever its threads do."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread that still encodes or compiles cannot be stopped; the bank keeps what was committed.
    os._exit(status)


if __name__ == "__main__":
    program()
