"""Everything there is to measure on one GPU, in one call; every result is printed and written as it comes.

    python -m benchmarks.gpu [--out=FOLDER] [--steps=rates,correctness,torch,targets] [--tune] [--rehearse]

Steps: the device's copy bandwidth and matrix-product rate; correctness of every case of both operations; the eager
PyTorch form, in a process of its own; the table of targets. `--tune` sweeps block sizes after that. A step or case
that fails is recorded with its error, and the next one runs. With `--rehearse` the script runs anywhere, at tiny sizes:
kernels interpreted where they are checked, the plain form where time is taken.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
import traceback

# Before JAX starts: PyTorch's process shares the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
from absl import app, flags, logging  # noqa: E402

from benchmarks import gpu_cases, gpu_targets  # noqa: E402
from benchmarks.measure import environment, write_json  # noqa: E402

STEPS = ("rates", "correctness", "torch", "targets")
_OUT = flags.DEFINE_string("out", os.environ.get("OUT", "benchmarks/results"), "Folder of the JSON file.")
_STEPS = flags.DEFINE_list("steps", list(STEPS), f"Steps to run, of {STEPS}; targets need the rates.")
_CASES = flags.DEFINE_string("cases", "", "Only correctness cases whose name contains this.")
_TUNE = flags.DEFINE_bool("tune", False, "Sweep block sizes too.")
_MINUTES = flags.DEFINE_float("minutes", 9.0, "No case starts later than this after the start.")
_REHEARSE = flags.DEFINE_bool("rehearse", False, "Tiny sizes, on whatever device there is.")

# Target: the least (or, with "ms", the most) that a figure may be.
_TARGETS = {
    "of_copy_bandwidth": 0.85, "int8_over_bfloat16": 1.7, "layers_ms": 17.0, "xla_over_gpu": 1.3, "of_floor": 0.6,
}  # fmt: skip


class Record:
    """The JSON file, whole after every entry."""

    def __init__(self, path: pathlib.Path, deadline: float):
        self.path, self.deadline, self.entries = path, deadline, {}

    def note(self, name: str, value) -> None:
        self.entries[name] = value
        write_json(self.path, self.entries)

    def attempt(self, name: str, measure) -> object:
        """Call, note and print; an exception is noted in its place, and what is too late is not begun."""
        if time.monotonic() > self.deadline:
            value = {"error": "not begun: out of time"}
        else:
            begin = time.monotonic()
            try:
                value = measure()
            except Exception as error:
                traceback.print_exc(limit=-3)
                value = {"error": f"{type(error).__name__}: {error}"[:2000]}
            value["took_s"] = round(time.monotonic() - begin, 2)
        self.note(name, value)
        shown = {key: f"{x:.4g}" if isinstance(x, float) else x for key, x in value.items() if not isinstance(x, dict)}
        print(f"{name}: {shown}", flush=True)
        return value


def _interpreted():
    """A scope in which the GPU kernels run here."""
    if jax.default_backend() == "gpu":
        return contextlib.nullcontext()
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())


def _correctness(record: Record, rehearse: bool, named: str) -> None:
    cases = [case for case in gpu_cases.CASES if named in case.name]
    with _interpreted():
        for case in cases[:2] if rehearse else cases:
            record.attempt(f"correctness, {case.name}", lambda case=case: gpu_cases.check(case))


def _torch(record: Record, rehearse: bool) -> dict:
    out = record.path.with_name("gpu_torch.json")
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.torch_baseline", f"--out={out}", *["--rehearse"] * rehearse]
    found = {}
    try:
        left = max(1.0, record.deadline - time.monotonic())
        done = subprocess.run(command, timeout=left, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            found["error"] = done.stderr.strip()[-500:]
    except subprocess.TimeoutExpired:
        found["error"] = "stopped: out of time"
    if out.exists():
        found |= json.loads(out.read_text())
    return found


def summary(entries: dict) -> list[dict]:
    """The targets and what was measured of each: `{"what", "figure", "target", "met"}`."""
    ms = {name: value["ms"] for name, value in entries.items() if isinstance(value, dict) and "ms" in value}
    rows = []

    def row(what, kind, figure):
        met = figure <= _TARGETS[kind] if kind.endswith("_ms") else figure >= _TARGETS[kind]
        rows.append({"what": f"{what}: {kind}", "figure": figure, "target": _TARGETS[kind], "met": met})

    for name, milliseconds in ms.items():
        if not name.endswith(", gpu"):
            continue
        entry, base = entries[name], name.removesuffix(", gpu")
        if name.startswith("routing, bfloat16"):
            row(base, "of_copy_bandwidth", entry["of_copy_bandwidth"])
            quantised = name.replace("bfloat16", "int8 keys")
            if quantised in ms:
                row(base, "int8_over_bfloat16", milliseconds / ms[quantised])
        elif name.startswith("routing and selection"):
            row(base, "layers_ms", milliseconds)
        elif name.startswith("attention"):
            row(base, "of_floor", entry["of_floor"])
            if f"{base}, xla" in ms:
                row(base, "xla_over_gpu", ms[f"{base}, xla"] / milliseconds)
    return rows


def run(record: Record, *, steps: list[str], cases: str, tune: bool, rehearse: bool) -> None:
    """Run the steps and note all there is to note; the arguments are those of the flags."""
    on_gpu = jax.default_backend() == "gpu"
    sizes = gpu_targets.TINY if rehearse else gpu_targets.SIZES
    implementations = ("gpu", "xla") if on_gpu else ("xla",)
    record.attempt("environment", environment)
    rates = None
    if "rates" in steps or "targets" in steps:
        measured = record.attempt("rates", lambda: vars(gpu_targets.measure_rates(sizes)).copy())
        rates = None if "error" in measured else gpu_targets.Rates(measured["copy"], measured["matmul"])
    if "correctness" in steps:
        _correctness(record, rehearse, cases)
    if "torch" in steps:
        record.attempt("torch", lambda: _torch(record, rehearse))
    if "targets" in steps and rates is not None:
        for table in (gpu_targets.all_layers, gpu_targets.routing_table, gpu_targets.attention_table):
            title = table.__name__.replace("_", " ")
            run = lambda table=table: table(sizes, rates, implementations, record.attempt) or {}  # noqa: E731
            record.attempt(title, run)
    if tune:
        from benchmarks import gpu_tuning

        record.attempt("tuning", lambda: gpu_tuning.tune(sizes, implementations[0], record) or {})
    rows = summary(record.entries)
    record.note("targets", rows)
    for entry in rows:
        print(f"{'met ' if entry['met'] else 'MISS'} {entry['what']} {entry['figure']:.3g} (target {entry['target']})")
    checked = [v for k, v in record.entries.items() if k.startswith("correctness")]
    failed = [k for k, v in record.entries.items() if k.startswith("correctness") and not v.get("passed")]
    print(f"{len(checked) - len(failed)} of {len(checked)} cases correct; failed: {failed}\n{record.path}")


def main(argv):
    unknown = set(_STEPS.value) - set(STEPS)
    if len(argv) > 1 or unknown:
        raise app.UsageError(f"Unknown arguments {argv[1:]} or steps {sorted(unknown)}; steps are {STEPS}.")
    if not _REHEARSE.value and jax.default_backend() != "gpu":
        raise app.UsageError(f"JAX sees no GPU here but {jax.devices()}; --rehearse runs the script without one.")
    logging.set_verbosity(logging.WARNING)
    name = "gpu_rehearsal.json" if _REHEARSE.value else "gpu_tuning.json" if _TUNE.value else "gpu.json"
    record = Record(pathlib.Path(_OUT.value) / name, time.monotonic() + 60 * _MINUTES.value)
    run(record, steps=_STEPS.value, cases=_CASES.value, tune=_TUNE.value, rehearse=_REHEARSE.value)


if __name__ == "__main__":
    app.run(main)
