"""Ask a memory: `python -m msa_jax.ask --workdir RUN --bank DIR "question"`, or --interactive, or --questions FILE.

The answer appears as it is written, then the documents that were read for it. With --json there is one object a
question instead.

Exit status: 0 answered, 1 refused with one sentence or given up after --timeout, 2 wrong usage, 3 not in memory,
130 interrupted. With --questions the first of 1, 3 and 0 that any of the questions has.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

from msa_jax.importing import exit_without

exit_without("bank", "ask")  # before what needs it is imported

from msa_jax.ask.prompt import Prompt, answer_one, width
from msa_jax.ask.show import as_json, clean, write_end, write_explanation
from msa_jax.bank.reader import BankReader
from msa_jax.cli.base import one_line, run
from msa_jax.cli.loading import add_flags, changes_of, loading_of
from msa_jax.errors import BankError, ConfigError, DataError
from msa_jax.inference.answer import Answer
from msa_jax.inference.settings import MODES, AskConfig, Budget, EngineConfig, Sampling, modes_help
from msa_jax.routing import need_scores

_HELP = {
    "temperature": "0 takes the most likely token always",
    "top_p": "draw from the most likely tokens that hold this much probability",
    "top_k": "draw from so many of the most likely tokens; 0 for all",
    "seed": "the same seed gives the same answer",
    "rounds": "retrievals at most",
    "documents": "documents read at most",
    "document_tokens": "tokens read of one document at most; default as there is room",
    "turn_tokens": "tokens of one turn in which documents are named",
    "answer_tokens": "tokens of the answer at most",
    "router_documents": "documents read with --mode router",
    "abstain_below": "say that it is not in memory if the best document's score is below this; default never",
    "timeout": "seconds after which a question is given up; default never",
    "slots": "questions computed together",
    "context": "tokens of a question, of the documents it reads and of its answer at most",
}


def _flags(group, kind: type, *names: str) -> None:
    for name in names:
        default = next(field.default for field in dataclasses.fields(kind) if field.name == name)
        convert = type(default) if default is not None else int if name == "document_tokens" else float
        shown = "" if default is None else f" (default {default})"
        group.add_argument(f"--{name}", type=convert, default=default, metavar="N", help=_HELP[name] + shown)


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m msa_jax.ask", description=__doc__, epilog=f"modes of asking:\n{modes_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    root.add_argument("question", nargs="?", help="what is asked")
    root.add_argument("--bank", required=True, metavar="DIR", help="folder of the bank, or a kvstore URL")
    model = root.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--workdir", default="", metavar="RUN", help="folder of the trained run whose model made the bank"
    )
    model.add_argument("--checkpoint", default="", metavar="DIR", help="or a folder in the published layout")
    root.add_argument("--questions", metavar="FILE", help="ask all of these, one a line; - for standard input")
    root.add_argument("--interactive", action="store_true", help="ask at a prompt")
    root.add_argument("--json", action="store_true", help="one JSON object a question, without progress")
    root.add_argument("--explain", action="store_true", help="also which documents the router finds, and by what")
    how = root.add_argument_group("how it is asked")
    how.add_argument(
        "--mode", choices=MODES, default="generate", help="how documents are found; see below (default %(default)s)"
    )
    how.add_argument(
        "--namespace", action="append", metavar="NAME", help="read documents of this one only; several may be given"
    )
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before it")
    how.add_argument("--stop_token", action="append", default=[], type=int, metavar="ID", help="or before this token")
    _flags(how, AskConfig, "router_documents", "abstain_below", "timeout")
    _flags(root.add_argument_group("how tokens are chosen"), Sampling, "temperature", "top_p", "top_k", "seed")
    budget = ("rounds", "documents", "document_tokens", "turn_tokens", "answer_tokens")
    _flags(root.add_argument_group("what it may cost"), Budget, *budget)
    _flags(root.add_argument_group("shapes that are compiled"), EngineConfig, "slots", "context")
    add_flags(root)
    return root


def settings(options) -> tuple[AskConfig, EngineConfig]:
    """What the flags say; raises ConfigError for values that are out of range."""

    def made(kind, **more):
        names = [field.name for field in dataclasses.fields(kind) if field.name not in more]
        return kind(**{name: getattr(options, name) for name in names}, **more)

    stops = dict(stop=tuple(options.stop), stop_tokens=tuple(options.stop_token))
    # Another retriever's documents can be given from Python only.
    config = made(AskConfig, sampling=made(Sampling), budget=made(Budget), given_documents=(), **stops)
    lengths = (*EngineConfig().lengths, *(1 << n for n in range(10, 24)))
    return config, EngineConfig(slots=options.slots, context=options.context, lengths=tuple(sorted(set(lengths))))


def questions_of(options) -> list[str]:
    """The questions of --questions, or the one given; raises DataError for none and for bytes that are no text."""
    if options.questions is None:
        questions = [] if options.question is None else [options.question]
        where = "the command line"
    else:
        stdin = options.questions == "-"
        raw = sys.stdin.buffer.read() if stdin else pathlib.Path(options.questions).read_bytes()
        where = "standard input" if stdin else options.questions
        try:
            questions = raw.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            raise DataError(f"{where}: line {line} is not UTF-8: save the questions as UTF-8.") from None
    questions = [q.strip() for q in questions if q.strip()]
    if not questions:
        raise DataError(f"{where}: there is no question: give one, --questions FILE or --interactive.")
    if any("\ud800" <= c <= "\udfff" for q in questions for c in q):
        raise DataError(f"{where}: the question is not UTF-8.")
    return questions


def open_session(options, config: AskConfig, engine: EngineConfig):
    """The session that is asked. What is not there is noticed before the model is loaded."""
    changes = changes_of(options)
    if options.explain:
        need_scores(changes.get("retriever", "exact"), "--explain")
    if options.namespace:
        with BankReader(options.bank) as bank:
            unknown = set(options.namespace) - set(bank.table.namespaces)
            if unknown:
                known = ", ".join(bank.table.namespaces) or "none yet"
                raise BankError(f"{options.bank}: no namespace {sorted(unknown)[0]!r}: it has {known}.")
    if sys.stderr.isatty() and not options.json:
        print("Loading. The first questions take longer: what computes them is compiled for them.", file=sys.stderr)
    # Here, because the model takes seconds to import.
    from msa_jax.inference.session import Session
    return Session.open(
        options.bank, workdir=options.workdir, checkpoint=options.checkpoint, engine=engine, defaults=config,
        loading=loading_of(options), changes=changes,
    )  # fmt: skip


def _answers(session, questions: Sequence[str], options, config: AskConfig, ahead: int) -> Iterator[Answer | str]:
    """Answers in order, or why a question is refused; so many are handed in `ahead` that all slots have work."""
    waiting: collections.deque = collections.deque()

    def hand_in(question):
        try:
            waiting.append(session.submit(question, namespaces=options.namespace, config=config))
        except ValueError as error:
            waiting.append(one_line(error))

    try:
        for question in questions:
            hand_in(question)
            while len(waiting) > ahead:
                first = waiting.popleft()
                yield first if isinstance(first, str) else first.result()
        while waiting:
            first = waiting[0]
            yield first if isinstance(first, str) else first.result()
            waiting.popleft()
    finally:
        for one in waiting:
            if not isinstance(one, str):
                one.cancel()


def _status(answer: Answer) -> int:
    return {"not_in_memory": 3, "timed_out": 1}.get(answer.outcome, 0)


def _ask_all(session, questions: Sequence[str], options, config: AskConfig) -> int:
    """All questions; the worst status."""
    statuses, explain = set(), lambda q: session.explain(q, namespaces=options.namespace)
    for question, answer in zip(
        questions, _answers(session, questions, options, config, ahead=4 * options.slots), strict=True
    ):
        if isinstance(answer, str):
            statuses.add(1)
            if options.json:
                print(json.dumps({"question": question, "error": answer}, ensure_ascii=False), flush=True)
            else:
                print(f"> {clean(question)}\n({answer})", flush=True)
            continue
        statuses.add(_status(answer))
        if options.json:
            value = as_json(answer, explain(question) if options.explain else None)
            print(json.dumps(value, ensure_ascii=False), flush=True)
            continue
        print(f"> {clean(question)}\n{clean(answer.text)}")
        write_end(answer, sys.stdout, width())
        if options.explain:
            write_explanation(explain(question), sys.stdout, width())
        print(flush=True)
    return next(status for status in (1, 3, 0) if status in statuses)


def _run(options, config: AskConfig, engine: EngineConfig) -> int:
    questions = [] if options.interactive else questions_of(options)
    with open_session(options, config, engine) as session:
        if options.interactive:
            if sys.stdin.isatty():
                import readline  # noqa: F401 -- gives input() its line editing
            Prompt(session, config, options.namespace).run()
            return 0
        if options.json or options.questions is not None:
            return _ask_all(session, questions, options, config)
        answer = answer_one(session, questions[0], config, options.namespace, sys.stdout)
        if options.explain:
            write_explanation(session.explain(questions[0], namespaces=options.namespace), sys.stdout, width())
        return _status(answer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask; see the module."""
    root = parser()
    options = root.parse_args(arguments)
    if sum((options.question is not None, options.questions is not None, options.interactive)) != 1:
        root.error("give one of: a question, --questions FILE, --interactive.")
    if options.interactive and options.json:
        root.error("--json is for questions that are given, not for --interactive.")
    try:
        config, engine = settings(options)
    except ConfigError as e:
        root.error(str(e))
    for stream in (sys.stdout, sys.stdin):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    return run("ask", lambda: _run(options, config, engine))


if __name__ == "__main__":
    sys.exit(main())
