"""train.py and eval.py as real processes that talk to each other on loopback."""

import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(cache, program, processes, *arguments, devices=1, different=None):
    """Start a program as so many processes with so many devices each, and do not wait; `different`: arguments of the
    last one alone. What one of them has compiled is kept in the folder `cache`."""
    port, started = free_port(), []
    # The time of these tests is compilation, so little is optimised.
    xla = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"{xla} --xla_llvm_disable_expensive_passes=true",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    for i in range(processes):
        command = [sys.executable, str(ROOT / program), *map(str, arguments)]
        if processes > 1:
            command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={i}"]
            command += ["--heartbeat_seconds=10", "--join_seconds=60"]
        if i == processes - 1:
            command += different or []
        # Into files: a full pipe would stop a process that nobody reads.
        output = open(pathlib.Path(cache) / f"output-{port}-{i}", "w+")  # noqa: SIM115
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        process.output = output
        started.append(process)
    return started


def text(process) -> str:
    """What it has written so far."""
    return pathlib.Path(process.output.name).read_text(errors="replace")


def finish(started, seconds=180):
    """Exit statuses and outputs, once all have ended."""
    end = time.monotonic() + seconds
    try:
        for process in started:
            process.wait(max(0.1, end - time.monotonic()))
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.output.close()
    return [p.returncode for p in started], [text(p) for p in started]


def wait_for(started, true, seconds=180):
    """Return once `true()`; an AssertionError with all output if a process ends before, or time does."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end or (any(p.poll() is not None for p in started) and not true()):
            raise AssertionError("\n---\n".join(finish(started, 0.1)[1]))
        time.sleep(0.01)
