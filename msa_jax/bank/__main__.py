"""The bank on disk from the command line: `python -m msa_jax.bank COMMAND DIR ...`.

    create DIR --workdir RUN            an empty bank of a trained run's model, or --checkpoint FOLDER's
    add | update DIR FILE --workdir RUN documents from JSON lines: id, text, and if you like title, namespace, metadata
    delete DIR ID... | get DIR ID | list DIR | stats DIR | verify DIR | compact DIR | export DIR

DIR may be a kvstore URL that TensorStore knows. FILE may be -, standard input. With --json results are JSON, one
object a line. Exit status: 0 done, 1 refused with one sentence, 130 interrupted; what was committed until then stays,
and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from msa_jax.importing import exit_without

exit_without("bank", "bank")  # before what needs it is imported

from msa_jax.bank.jsonl import count_lines, read_documents
from msa_jax.bank.stats import DEVICES, stats
from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import DEFAULT_NAMESPACE
from msa_jax.cli.base import run
from msa_jax.errors import BankError


def _encoder(options):
    # Here, because a model takes seconds to import and most commands need none.
    from msa_jax.bank.document_encoder import DocumentEncoder
    from msa_jax.runs.open import open_model

    model, tokenizer, row_len = open_model(workdir=options.workdir or "", checkpoint=options.checkpoint or "")
    row_len = options.row_len or row_len
    return DocumentEncoder(model, tokenizer, row_len=row_len, rows_per_step=options.rows_per_step)


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"need I/N with I from 1 to N, such as 2/4, got {text}")
    return int(index) - 1, int(count)


def create(options) -> dict[str, Any]:
    with MemoryStore.create(options.folder, _encoder(options).spec) as store:
        return {"created": str(options.folder), **dataclasses.asdict(store.spec)}


def ingest(options) -> dict[str, Any]:
    documents = read_documents(options.file)
    settings = dict(progress=not options.json, total=None if options.json else count_lines(options.file))
    if options.part is not None:
        from msa_jax.bank.parts import add_part

        index, count = options.part
        MemoryStore(options.folder).close()
        report = add_part(options.folder, documents, _encoder(options), index=index, count=count, **settings)
        return report.to_dict()
    with MemoryStore(options.folder, writable=True) as store:
        change = {"add": store.add, "update": store.update}[options.command]
        report = change(documents, _encoder(options), **settings)
        return report.to_dict() | {"version": store.version, "documents": len(store)}


def delete(options) -> dict[str, Any]:
    with MemoryStore(options.folder, writable=True) as store:
        return {"deleted": store.delete(options.ids, options.namespace), "version": store.version}


def get(options) -> dict[str, Any]:
    with MemoryStore(options.folder, version=options.version) as store:
        try:
            return dataclasses.asdict(store.get(options.id, options.namespace))
        except KeyError as e:
            raise BankError(e.args[0]) from None


def listing(options) -> Iterator[dict[str, Any]]:
    with MemoryStore(options.folder, version=options.version) as store:
        for namespace, identity in store.search(options.prefix, options.in_namespace):
            yield {"namespace": namespace, "id": identity}


def show_stats(options) -> dict[str, Any]:
    with MemoryStore(options.folder, version=options.version) as store:
        return stats(store, device=options.device)


def check(options) -> dict[str, Any]:
    with MemoryStore(options.folder, version=options.version) as store:
        return store.verify(progress=not options.json)


def compact(options) -> dict[str, Any]:
    with MemoryStore(options.folder, writable=True) as store:
        return store.compact(progress=not options.json)


def export(options) -> Iterator[dict[str, Any]]:
    with MemoryStore(options.folder, version=options.version) as store:
        rows = store.table.alive
        for first in range(0, len(rows), 1024):
            yield from map(dataclasses.asdict, store.documents(rows[first : first + 1024]))


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m msa_jax.bank", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, summary, *, reads=False, encodes=False):
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        sub.add_argument("folder", metavar="DIR", help="folder of the bank, or a kvstore URL that TensorStore knows")
        sub.add_argument("--json", action="store_true", help="print JSON lines and no progress")
        if reads:
            sub.add_argument("--version", type=int, help="an earlier version; default the newest")
        if encodes:
            model = sub.add_mutually_exclusive_group(required=True)
            model.add_argument("--workdir", help="folder of the trained run whose model encodes")
            model.add_argument("--checkpoint", help="or a folder in the published layout, its tokenizer within")
            sub.add_argument("--row_len", type=int, help="tokens of the longest document; default as trained, or 4096")
            sub.add_argument("--rows_per_step", type=int, default=16, help="rows of that length encoded at once")
        return sub

    command("create", create, "make an empty bank", encodes=True)
    for name, summary in (("add", "add documents"), ("update", "replace documents that exist")):
        sub = command(name, ingest, summary, encodes=True)
        sub.add_argument("file", metavar="FILE", help="JSON lines, or - for standard input")
        sub.set_defaults(part=None)
        if name == "add":
            sub.add_argument(
                "--part", type=_part, metavar="I/N", help="of N processes with the same FILE, this is the I-th"
            )
    sub = command("delete", delete, "delete documents")
    sub.add_argument("ids", nargs="+", metavar="ID")
    sub.add_argument("--namespace", default=DEFAULT_NAMESPACE)
    sub = command("get", get, "print a document", reads=True)
    sub.add_argument("id", metavar="ID")
    sub.add_argument("--namespace", default=DEFAULT_NAMESPACE)
    sub = command("list", listing, "list ids", reads=True)
    sub.add_argument("--prefix", default="", help="only ids that begin with it")
    sub.add_argument("--namespace", dest="in_namespace", help="only of this namespace")
    sub = command("stats", show_stats, "count documents, tokens, bytes and versions", reads=True)
    sub.add_argument("--device", help=f"also what it would take there: {', '.join(DEVICES)}")
    command("verify", check, "read everything and compare it with its checksums", reads=True)
    command("compact", compact, "reclaim the place of deleted documents and earlier versions")
    command("export", export, "print all documents as JSON lines", reads=True)
    return root


def _show(value: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(value, ensure_ascii=False))
        return
    for name, item in value.items():
        print(f"{name}: {json.dumps(item, ensure_ascii=False) if isinstance(item, dict | list) else item}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; see the module."""
    options = parser().parse_args(arguments)

    def work() -> None:
        result = options.run(options)
        lines = options.command in ("list", "export")
        for value in result if lines else [result]:
            _show(value, options.json or lines)

    stays = "interrupted; what was committed stays, the same command goes on from there."
    return run("bank", work, interrupted=stays)


if __name__ == "__main__":
    sys.exit(main())
