"""The bank on disk from the command line: `python -m msa_jax.bank COMMAND DIR ...`.

    create DIR --workdir RUN            an empty bank of a trained run's model
    add | update DIR FILE --workdir RUN documents from JSON lines: id, text, and if you like title, namespace, metadata
    delete DIR ID... | get DIR ID | list DIR | stats DIR | verify DIR | export DIR

FILE may be -, standard input. With --json results are JSON, one object a line. Exit status: 0 done, 1 refused with
one sentence, 130 interrupted; what was committed until then stays, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from msa_jax.bank.manifest import BankError
from msa_jax.bank.store import MemoryStore
from msa_jax.bank.table import DEFAULT_NAMESPACE, BankDocument
from msa_jax.bank.verify import sizes, verify


def read_jsonl(path: str) -> Iterator[BankDocument]:
    """Documents of a file of JSON lines, or of standard input for "-"; the file is opened at once, then streamed.

    Raises:
      BankError: no such file, or a line that is no document; it is named.
    """
    try:
        file = sys.stdin if path == "-" else open(path, encoding="utf-8")
    except OSError as e:
        raise BankError(f"{path}: {e.strerror}.") from e

    def documents():
        with file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _document(line, f"{path}, line {number}")

    return documents()


def _document(line: str, where: str) -> BankDocument:
    try:
        values = json.loads(line)
    except ValueError as e:
        raise BankError(f"{where}: not valid JSON ({e}).") from e
    names = {field.name for field in dataclasses.fields(BankDocument)}
    if not isinstance(values, dict) or not {"id", "text"} <= values.keys() <= names:
        raise BankError(f"{where}: needs an object with id and text, and of these at most: {', '.join(sorted(names))}.")
    if not all(isinstance(values.get(name, ""), str) for name in names - {"metadata"}) or not values["id"]:
        raise BankError(f"{where}: id, text, title and namespace must be strings, and id not empty.")
    if not isinstance(values.get("metadata", {}), dict):
        raise BankError(f"{where}: metadata must be an object.")
    return BankDocument(**values)


def _encoder(options):
    # Here, because a model takes seconds to import and most commands need none.
    from msa_jax.bank.document_encoder import DocumentEncoder
    from msa_jax.evaluation.evaluate import load_model
    from msa_jax.run_config import RunConfig

    folder = pathlib.Path(options.workdir)
    try:
        run = RunConfig.from_dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as e:
        raise BankError(f"--workdir {folder}: no trained run there ({e}).") from e
    model, renderer = load_model(run, folder)
    chunk = model.config.chunk_size
    row_len = options.row_len or run.row_len(chunk)
    return DocumentEncoder(model, renderer.tokenizer, row_len=row_len, rows_per_step=options.rows_per_step)


def create(options) -> dict[str, Any]:
    with MemoryStore.create(options.folder, _encoder(options).spec) as store:
        return {"created": str(options.folder), **dataclasses.asdict(store.spec)}


def ingest(options) -> dict[str, Any]:
    from msa_jax.bank.ingest import add, update

    documents = read_jsonl(options.file)
    with MemoryStore(options.folder, writable=True) as store:
        change = {"add": add, "update": update}[options.command]
        report = change(store, documents, _encoder(options), progress=not options.json)
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


def stats(options) -> dict[str, Any]:
    with MemoryStore(options.folder, version=options.version) as store:
        m = store.manifest
        totals = {name: getattr(m, name) for name in ("version", "documents", "tokens", "chunks", "rows")}
        kept = [f"{v.version} {v.operation} {v.time}" for v in store.versions(last=10)]
        return totals | {"namespaces": list(m.namespaces), "bytes": sizes(store), "versions": kept}


def check(options) -> dict[str, Any]:
    with MemoryStore(options.folder, version=options.version) as store:
        return verify(store, progress=not options.json)


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
            sub.add_argument("--workdir", required=True, help="folder of the trained run whose model encodes")
            sub.add_argument("--row_len", type=int, help="tokens of the longest document; default as in training")
            sub.add_argument("--rows_per_step", type=int, default=16, help="rows of that length encoded at once")
        return sub

    command("create", create, "make an empty bank", encodes=True)
    for name, summary in (("add", "add documents"), ("update", "replace documents that exist")):
        sub = command(name, ingest, summary, encodes=True)
        sub.add_argument("file", metavar="FILE", help="JSON lines, or - for standard input")
    sub = command("delete", delete, "delete documents")
    sub.add_argument("ids", nargs="+", metavar="ID")
    sub.add_argument("--namespace", default=DEFAULT_NAMESPACE)
    sub = command("get", get, "print a document", reads=True)
    sub.add_argument("id", metavar="ID")
    sub.add_argument("--namespace", default=DEFAULT_NAMESPACE)
    sub = command("list", listing, "list ids", reads=True)
    sub.add_argument("--prefix", default="", help="only ids that begin with it")
    sub.add_argument("--namespace", dest="in_namespace", help="only of this namespace")
    command("stats", stats, "count documents, tokens, bytes and versions", reads=True)
    command("verify", check, "read everything and compare it with its checksums", reads=True)
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
    try:
        result = options.run(options)
        lines = options.command in ("list", "export")
        for value in result if lines else [result]:
            _show(value, options.json or lines)
    except BankError as e:
        print(f"bank: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bank: interrupted; what was committed stays, the same command goes on from there.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
