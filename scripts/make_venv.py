"""Makes or repairs .venv and installs the project with its test tools there. `make setup` runs it.

Standard library only, under any Python >= 3.12; the environment gets the Python that runs this file. An
existing environment is kept if it works. Exits 1 with one sentence when a step fails.
"""

import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
USED = "jax, flax.nnx, optax, orbax.checkpoint, grain, tokenizers, tensorboardX, matplotlib.pyplot, pytest"


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def works(venv: pathlib.Path) -> bool:
    """Whether `venv` has a Python that runs, is new enough and has pip, and no installation was cut short."""
    if unfinished(venv).exists():
        return False
    probe = "import pip, sys; sys.exit(sys.version_info < (3, 12))"
    try:
        return subprocess.run([venv / "bin/python", "-c", probe], capture_output=True).returncode == 0
    except OSError:  # no such file, or not a program
        return False


def unfinished(venv: pathlib.Path) -> pathlib.Path:
    """The file that lies in `venv` during an installation. After a cut-short one pip can take a half-copied
    package for a whole one, so what it left is not kept."""
    return venv / ".setup-unfinished"


def set_up(root: pathlib.Path, run=subprocess.run) -> None:
    """Brings `root`/.venv up to date: makes it if it does not work, installs if the settings are newer.

    Raises CalledProcessError when a step fails. `run` starts a step; tests give their own.
    """
    start = time.monotonic()
    venv = root / ".venv"
    stamp = venv / ".setup-done"
    kept = works(venv)
    newest = max((root / name).stat().st_mtime for name in ("setup.cfg", "pyproject.toml"))
    if kept and stamp.exists() and stamp.stat().st_mtime >= newest:
        return
    if not kept:
        if venv.exists():
            say("the .venv here does not work or was left unfinished: making it anew")
            shutil.rmtree(venv)
        venv.mkdir()
    unfinished(venv).touch()
    python = venv / "bin/python"
    if not kept:
        say(f"making .venv with Python {sys.version.split()[0]} ({sys.executable})")
        run([sys.executable, "-m", "venv", venv], check=True)
    say("installing the packages with pip (about half a minute on a fast network)")
    # The import below compiles what is used; to compile all that is installed takes longer.
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    run([python, *pip, "--editable", ".[test]"], check=True, cwd=root)
    say("importing them for the first time")
    writing = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run([python, "-c", f"import {USED}"], check=True, cwd=root, env=writing)
    unfinished(venv).unlink()
    stamp.touch()
    say(f".venv is ready after {time.monotonic() - start:.0f} s")


def main() -> None:
    # Locking this very file needs no lock file, and the lock ends with the process, however that ends.
    with open(__file__, "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another setup is at work in this folder: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            set_up(ROOT)
        except subprocess.CalledProcessError as error:
            step = " ".join(map(str, error.cmd[1:4]))
            sys.exit(f"setup: `python {step} ...` failed: mend what it says above, then run it again.")
        except KeyboardInterrupt:
            sys.exit("setup: interrupted; `make setup` starts again from the beginning.")


if __name__ == "__main__":
    main()
