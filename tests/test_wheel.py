"""The wheel, installed into an empty environment: console scripts, configs by name, types."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest

SCRIPTS = ("train", "eval", "bank", "ask", "serve", "plan", "parity", "export")


def output(*command, cwd) -> str:
    # What PYTHONPATH names would hide the installation.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    """Built from a copy, so that no build folder is left in the tree, and without the network."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("msa_jax", "pallas_kernels", "configs"):
        shutil.copytree(root / name, folder / "source" / name, symlinks=True, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    output(*pip, "--no-build-isolation", "--wheel-dir", folder, folder / "source", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder bin/ of an environment with the wheel alone; what it needs it takes from the environment of the tests,
    whose own installation of this package it hides."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin/python"]
    output(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    (site / "needed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    return folder / "bin"


def test_the_wheel_holds_all_modules_configs_and_types(root, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = [*root.glob("msa_jax/**/*.py"), *root.glob("pallas_kernels/**/*.py")]
    assert {str(path.relative_to(root)) for path in modules} <= names and "msa_jax/py.typed" in names
    assert {f"msa_jax/configs/{path.name}" for path in root.glob("configs/*.py")} <= names
    assert not {name for name in names if name.partition("/")[0] in ("configs", "tests", "benchmarks")}


@pytest.mark.slow
def test_console_scripts_print_help_and_find_configs(installed, tmp_path):
    where = output(installed / "python", "-c", "import msa_jax; print(msa_jax.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parent))
    for name in SCRIPTS:
        text = output(installed / f"msa-{name}", "--help", cwd=tmp_path)
        assert "usage: " in text or "flags:" in text
    for given in ("demo", "configs/demo.py"):
        shown = output(installed / "msa-train", f"--config={given}", "--workdir=run", "--print_config", cwd=tmp_path)
        assert "router_bias_init" in shown
