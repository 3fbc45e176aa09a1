"""A bank of 100M tokens on disk: building it from a stream, opening, changing and verifying it.

    python -m benchmarks.bank_scale --folder /tmp/scale.bank --tokens 100000000

Documents are sentences of the standard library's documentation in random order, about 100 tokens each, all
distinct; the model is the tiny preset with chunks of 64 tokens and random weights. An interrupted build goes on, and
the record then says that its times are of the last run alone. Every step is a process of its own, with the page cache
dropped before where that is allowed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pathlib
import re
import resource
import threading
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.measure import environment, write_json

_MIN_CHARS, _ROW_LEN = 370, 512
_RESULTS = "benchmarks/results/bank_scale.json"


def sentences() -> list[str]:
    from msa_jax.data.sources.python_docs import PythonDocsSource

    texts = PythonDocsSource("train", max_chars=3_000_000).passages()
    found = {" ".join(s.split()) for text in texts for s in re.split(r"(?<=[.!?])\s+", text)}
    return sorted(s for s in found if 20 <= len(s) <= 80)


def documents(tokens: int, tokenizer) -> Iterator:
    """Documents of `tokens` tokens together, as their lengths in characters foretell; made as they are asked for."""
    from msa_jax.bank import BankDocument

    pool = sentences()
    per_char = len(tokenizer.encode(" ".join(pool[:2000]))) / len(" ".join(pool[:2000]))
    rng = np.random.default_rng(0)
    number, total = 0, 0.0
    while total < tokens:
        for pick in rng.integers(len(pool), size=(4096, 16)):
            text = f"{number:x}."
            for i in pick:
                if len(text) >= _MIN_CHARS:
                    break
                text += " " + pool[i]
            yield BankDocument(f"document {number}", text)
            number, total = number + 1, total + per_char * len(text)
            if total >= tokens:
                return


def encoder(rows_per_step: int):
    from flax import nnx

    from msa_jax import MSAConfig, MSATransformer
    from msa_jax.bank import DocumentEncoder
    from msa_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(sentences(), vocab_size=4096)
    model = MSATransformer(MSAConfig.preset("tiny", chunk_size=64), rngs=nnx.Rngs(0))
    return DocumentEncoder(model, tokenizer, row_len=_ROW_LEN, rows_per_step=rows_per_step)


def resident_bytes() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def build(folder: str, tokens: int) -> dict:
    """Add what is missing; peak memory is what came on top of the compiled model."""
    from msa_jax import MemoryStore

    enc = encoder(rows_per_step=64)
    enc.encode([np.ones(_ROW_LEN, np.int32)], [1])
    before, peak, done = resident_bytes(), [0], threading.Event()

    def watch():
        while not done.wait(0.2):
            peak[0] = max(peak[0], resident_bytes())

    threading.Thread(target=watch, daemon=True).start()
    if not (pathlib.Path(folder) / "CURRENT").exists():
        MemoryStore.create(folder, enc.spec).close()
    with MemoryStore(folder, writable=True) as store:
        resumed = store.manifest.tokens
        report = store.add(documents(tokens, enc.tokenizer), enc, progress=True)
        m = store.manifest
        done.set()
        return {
            "resumed_at_tokens": resumed,
            "report": report.to_dict(),
            "model_bytes_resident": before,
            "encoder_peak_bytes_above_model": peak[0] - before,
            "documents": m.documents, "tokens": m.tokens, "chunks": m.chunks,
        }  # fmt: skip


def use(folder: str) -> dict:
    """Open, look up, change; seconds each."""
    from msa_jax import MemoryStore
    from msa_jax.bank import BankDocument
    from msa_jax.bank.stats import stats

    enc = encoder(rows_per_step=1)
    enc.encode([np.ones(20, np.int32)], [1])
    seconds = {}

    def timed(name, call):
        begin = time.perf_counter()
        result = call()
        seconds[name] = round(time.perf_counter() - begin, 4)
        return result

    cold = drop_caches()
    store = timed("open_cold" if cold else "open", lambda: MemoryStore(folder))
    table_bytes = store.table.columns.nbytes
    store.close()
    timed("open_warm", lambda: MemoryStore(folder).close())
    timed("open_an_earlier_version", lambda: MemoryStore(folder, version=2).close())
    with MemoryStore(folder, writable=True) as store:
        timed("get", lambda: store.get("document 4711"))
        new = [BankDocument(f"new {time.time()} {i}", f"something new, {time.time()} {i}") for i in range(9)]
        adds = []
        for document in new:
            begin = time.perf_counter()
            store.add([document], enc)
            adds.append(time.perf_counter() - begin)
        seconds["add_one"], seconds["add_one_worst"] = round(float(np.median(adds)), 4), round(max(adds), 4)
        timed("update_one", lambda: store.update([BankDocument(new[1].id, "another text")], enc))
        timed("delete_one", lambda: store.delete([new[0].id]))
        timed("delete_rest", lambda: store.delete([d.id for d in new[1:]]))
        shown = stats(store)
    return {"seconds": seconds, "table_bytes": table_bytes, "cold": cold, "stats": shown}


def read(folder: str) -> dict:
    """Read all bytes of the files, then load the bank onto the device, then verify it."""
    from msa_jax import MemoryStore
    from msa_jax.bank import load

    drop_caches()
    begin, total = time.perf_counter(), 0
    for file in pathlib.Path(folder).glob("bank-*/d/*"):
        with file.open("rb", buffering=0) as f:
            while block := f.read(1 << 22):
                total += len(block)
    raw = total / (time.perf_counter() - begin)
    drop_caches()
    with MemoryStore(folder) as store:
        before = resident_bytes()
        begin = time.perf_counter()
        bank = load(store).bank
        bank.content_v.block_until_ready()
        loading = time.perf_counter() - begin
        nbytes = bank.nbytes
        held = resident_bytes() - before
        del bank
        begin = time.perf_counter()
        store.verify(progress=True)
        verifying = time.perf_counter() - begin
    return {
        "files_bytes_per_second": round(raw),
        "load_seconds": round(loading, 2),
        "load_bytes_per_second": round(nbytes / loading),
        "bank_bytes": nbytes,
        "resident_bytes_after_load": held,
        "verify_seconds": round(verifying, 2),
    }


def compact(folder: str) -> dict:
    from msa_jax import MemoryStore

    with MemoryStore(folder, writable=True) as store:
        begin = time.perf_counter()
        report = store.compact(progress=True)
        return {"compact_seconds": round(time.perf_counter() - begin, 2), "compact": report}


def drop_caches() -> bool:
    try:
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where the bank is, or comes")
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--steps", default="build,use,read,compact", help="which of these, in order")
    parser.add_argument("--out", default=_RESULTS)
    options = parser.parse_args()
    steps = {"build": build, "use": use, "read": read, "compact": compact}
    record = {"command": f"python -m benchmarks.bank_scale --tokens {options.tokens}"}
    for name in options.steps.split(","):
        arguments = (options.folder, options.tokens) if name == "build" else (options.folder,)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            record[name] = pool.apply(steps[name], arguments)
        print(name, record[name], flush=True)
        write_json(options.out, record | environment())


if __name__ == "__main__":
    main()
