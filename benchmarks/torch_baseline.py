"""The published algorithm as eager PyTorch runs it: scores per head, documents gathered one by one.

    python -m benchmarks.torch_baseline --out=FILE

It computes what `routing.document_scores`, `routing.select` and `gather_attention` compute, in the form of the
published code (arXiv 2603.23516): keys repeated for every query head, scores [B, H, T, C] in memory, their mean over
heads and max over tokens, a scatter to documents; then the chunks of the selected documents concatenated, padded to
the longest question's, and dense attention with repeated keys and values.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time

from benchmarks.measure import write_json


def _torch():
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("torch_baseline: PyTorch is not installed here; `pip install torch` brings the comparison.")
    import torch

    return torch


def per_head(x, group: int):
    """[B, K, n, D] or [K, n, D] -> the same for H = K * group heads, every head's own copy."""
    return x.repeat_interleave(group, dim=-3)


def route(query, keys, owners, documents: int, k: int):
    """The k best documents of each question, [B, k], and their scores.

    Args:
      query: [B, H, T, D], keys: [C, K, D], both L2-normalised; owners: [C] int64, the document of each chunk.
    """
    torch = _torch()
    repeated = per_head(keys.transpose(0, 1), query.shape[1] // keys.shape[1])
    scores = torch.matmul(query, repeated.transpose(-1, -2)).mean(dim=1).amax(dim=1)
    out = torch.full((query.shape[0], documents), float("-inf"), dtype=scores.dtype, device=scores.device)
    out = out.scatter_reduce(1, owners.expand(query.shape[0], -1), scores, reduce="amax")
    return torch.topk(out, min(k, documents), dim=1)


def attend(q, k, v, bank_k, bank_v, starts, lengths):
    """Attention over the selected documents' chunks and the own tokens, causal; [B, H, T, D].

    Args:
      q: [B, H, T, D]; k, v: [B, K, S, D]; bank_k, bank_v: [C, K, D].
      starts, lengths: lists [B][k] of int, as the published loop has them.
    """
    torch = _torch()
    b, h, t, d = q.shape
    kv, s = k.shape[1], k.shape[2]
    width = max(sum(row) for row in lengths)
    memory_k, memory_v = (q.new_zeros(b, kv, width, d) for _ in range(2))
    exists = torch.zeros(b, width, dtype=torch.bool, device=q.device)
    for i in range(b):
        ranges = [slice(start, start + length) for start, length in zip(starts[i], lengths[i], strict=True)]
        count = sum(lengths[i])
        memory_k[i, :, :count] = torch.cat([bank_k[r] for r in ranges]).transpose(0, 1)
        memory_v[i, :, :count] = torch.cat([bank_v[r] for r in ranges]).transpose(0, 1)
        exists[i, :count] = True
    keys = per_head(torch.cat([memory_k, k], dim=2), h // kv)
    values = per_head(torch.cat([memory_v, v], dim=2), h // kv)
    causal = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    seen = torch.cat([exists[:, None].expand(b, t, width), causal[None].expand(b, t, s)], dim=2)[:, None]
    logits = torch.matmul(q, keys.transpose(-1, -2)) * d**-0.5
    weights = logits.masked_fill(~seen, float("-inf")).float().softmax(dim=-1).to(q.dtype)
    return torch.matmul(weights, values)


def _median_seconds(call, repeats: int) -> float:
    torch = _torch()
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    times = []
    for _ in range(repeats + 2):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def measure(sizes, repeats: int, note) -> None:
    """Time every case of `gpu_targets.Sizes`; `note(name, seconds or error text)` is called after each."""
    torch = _torch()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    h, kv, d, k = sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.top_k
    normal = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
    unit = lambda x: torch.nn.functional.normalize(x, dim=-1)  # noqa: E731

    def timed(name, make):
        try:
            with torch.no_grad():
                call = make()
                note(name, _median_seconds(call, repeats))
        except Exception as error:  # too large for this device, most likely
            note(name, f"{type(error).__name__}: {error}"[:300])
        if device == "cuda":
            torch.cuda.empty_cache()

    keys = unit(normal(sizes.chunks, kv, d))
    owners = torch.arange(sizes.chunks, device=device) // sizes.document_chunks
    documents = -(-sizes.chunks // sizes.document_chunks)
    for b, t in sizes.routing:
        arguments = (unit(normal(b, h, t, d)), keys, owners, documents, k)
        timed(f"routing B {b}, T {t}", lambda a=arguments: lambda: route(*a))
    keys = arguments = None  # what follows needs the room

    bank_k, bank_v = normal(sizes.bank, kv, d), normal(sizes.bank, kv, d)
    for b, t, s in sizes.attention:
        starts, lengths = sizes.ranges(b)
        q, own_k, own_v = normal(b, h, t, d), normal(b, kv, s, d), normal(b, kv, s, d)
        arguments = (q, own_k, own_v, bank_k, bank_v, starts.tolist(), lengths.tolist())
        timed(f"attention B {b}, T {t}, S {s}", lambda a=arguments: lambda: attend(*a))


def main():
    from benchmarks.gpu_targets import SIZES, TINY

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON file to write after every case")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes")
    arguments = parser.parse_args()
    torch = _torch()
    record = {"torch": torch.__version__, "seconds": {}}

    def note(name, value):
        record["seconds"][name] = value
        print(f"torch, {name}: {value}", flush=True)
        write_json(arguments.out, record)

    measure(TINY if arguments.rehearse else SIZES, arguments.repeats, note)


if __name__ == "__main__":
    main()
