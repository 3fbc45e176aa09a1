"""How the project is set up: the search for a Python, the making of .venv, and what setup.cfg declares."""

import ast
import configparser
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from msa_jax.importing import EXTRAS

REAL = pathlib.Path(os.path.realpath(sys.executable))
OWN = {"msa_jax", "pallas_kernels", "configs", "benchmarks", "tests", "examples"}


def program(path: pathlib.Path, text: str) -> pathlib.Path:
    """Writes an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def pretend(path: pathlib.Path, before: str) -> pathlib.Path:
    """A Python that executes `before` ahead of the code given with -c."""
    return program(path, f"""exec "{REAL}" -c 'import sys; {before}; exec(sys.argv.pop(2))' "$@" """)


def old(path: pathlib.Path) -> pathlib.Path:
    return pretend(path, 'sys.version_info = (3, 11, 9, "final", 0)')


def good(path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(REAL)
    return path


@pytest.fixture
def find(root, tmp_path):
    """Runs find_python.sh with the folder bin/ and a bare minimum of tools on PATH."""
    bash = shutil.which("bash")
    (tmp_path / "bin").mkdir()

    def run(**env):
        env = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home")} | env
        script = root / "scripts/find_python.sh"
        return subprocess.run([bash, script], env=env, capture_output=True, text=True)

    return run


def test_broken_old_and_maimed_pythons_are_passed_over(find, tmp_path):
    shims, bins = tmp_path / "shims-are-first", tmp_path / "bin"
    program(shims / "python3.12", 'echo "pyenv: python3.12: command not found" >&2; exit 127')
    old(shims / "python3")
    pretend(bins / "python3.12", 'sys.modules["ensurepip"] = None')  # as Debian ships it
    wanted = good(bins / "python3.13")
    done = find(PATH=f"{shims}:{bins}")
    assert (done.stdout, done.stderr, done.returncode) == (f"{wanted}\n", "", 0)


def test_a_good_python3_behind_an_old_one_is_found(find, tmp_path):
    old(tmp_path / "first/python3")
    wanted = good(tmp_path / "bin/python3")
    assert find(PATH=f"{tmp_path}/first:{tmp_path}/bin").stdout == f"{wanted}\n"


@pytest.mark.parametrize("place", ["PYENV_ROOT", "HOME", "PATH"])
def test_versions_of_pyenv_are_found(find, tmp_path, place):
    pyenv = tmp_path / ("home/.pyenv" if place == "HOME" else "some where")
    program(pyenv / "shims/python3.12", "exit 127")
    old(pyenv / "versions/3.11.9/bin/python")
    wanted = good(pyenv / "versions/3.12.7/bin/python")
    env = {"PYENV_ROOT": {"PYENV_ROOT": str(pyenv)}, "HOME": {}, "PATH": {"PATH": f"{pyenv}/shims"}}[place]
    assert find(**env).stdout == f"{wanted}\n"


def test_uv_is_asked_last(find, tmp_path):
    wanted = good(tmp_path / "uv's/python3.14")
    program(tmp_path / "bin/uv", f'[ "$1 $2" = "python find" ] && echo "{wanted}"')
    assert find().stdout == f"{wanted}\n"


def test_inside_a_virtual_environment_its_base_is_found(find, tmp_path):
    venv = tmp_path / "venv"
    good(venv / "bin/python3.12")
    (venv / "pyvenv.cfg").write_text(f"home = {REAL.parent}\n")
    found = pathlib.Path(find(PATH=f"{venv}/bin").stdout.strip())
    assert found.resolve() == REAL and venv not in found.parents


def test_without_any_python_one_sentence_says_what_to_do(find, tmp_path):
    old(tmp_path / "bin/python3")
    program(tmp_path / "bin/uv", "exit 2")
    done = find()
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"No Python >= 3\.12 .* run this again\.\n", done.stderr)


@pytest.fixture
def set_up(root, tmp_path):
    """set_up() of make_venv.py for a project in tmp_path, with steps that are recorded, not executed."""
    spec = importlib.util.spec_from_file_location("make_venv", root / "scripts/make_venv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(root / name, tmp_path)
    os.utime(tmp_path / "setup.cfg", (0, 0))

    def run(fail: str = "nothing") -> list[str]:
        steps = []

        def record(command, check, **_):
            assert check
            step = command[2].split()[0]  # python -m venv, python -m pip, python -c "import ..."
            steps.append(step)
            if step == fail:
                raise subprocess.CalledProcessError(1, command)
            if step == "venv":
                program(tmp_path / ".venv/bin/python", "exit 0")

        try:
            module.set_up(tmp_path, record)
        except subprocess.CalledProcessError:
            assert fail in steps
        return steps

    return run


def test_setup_is_done_once_and_again_when_the_settings_change(set_up, tmp_path):
    assert set_up() == ["venv", "pip", "import"]
    assert set_up() == []
    kept = tmp_path / ".venv/kept"
    kept.touch()
    later = (tmp_path / ".venv/.setup-done").stat().st_mtime + 7
    os.utime(tmp_path / "setup.cfg", (later, later))
    assert set_up() == ["pip", "import"] and kept.exists()


@pytest.mark.parametrize("step", ["venv", "pip", "import"])
def test_an_interrupted_setup_is_repaired(set_up, tmp_path, step):
    set_up(fail=step)
    assert not (tmp_path / ".venv/.setup-done").exists()
    leftover = tmp_path / ".venv/half-a-package"
    leftover.touch()
    assert set_up() == ["venv", "pip", "import"]
    assert not leftover.exists() and set_up() == []


def test_an_environment_whose_python_fails_is_made_anew(set_up, tmp_path):
    set_up()
    program(tmp_path / ".venv/bin/python", "exit 1")
    assert set_up() == ["venv", "pip", "import"]
    (tmp_path / ".venv/bin/python").unlink()
    assert set_up() == ["venv", "pip", "import"]


def imports(files, root) -> dict[str, str]:
    """What `files` import at any depth of their code: {dotted name: the last file that does}."""
    found = {}
    for file in files:
        package = file.relative_to(root).parent.parts
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
                node.body = []  # never imported
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else ()
                names = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
            else:
                continue
            found |= dict.fromkeys(names, str(file))
    return found


@pytest.fixture(scope="module")
def declared(root) -> dict[str, set[str]]:
    """Distributions that each extra of setup.cfg installs, "" without one."""
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg")
    lines = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    names = {extra: set(re.findall(r"^\s*([\w-]+)(?!.*\[)", text, re.M)) for extra, text in lines.items()}
    names = {extra: {normal(name) for name in given} for extra, given in names.items()}
    within = {extra: re.findall(r"msa-jax\[(.*)\]", text) for extra, text in lines.items()}
    for extra, others in within.items():
        for other in ",".join(others).split(",") if others else ():
            names[extra] |= names[other]
    return {extra: given | names[""] for extra, given in names.items()}


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


# Folders and files by the extra that they need; all others of `msa_jax` need "train".
CORE = {
    "__init__.py", "errors.py", "importing.py", "files.py", "config.py", "spec.py", "families", "distributed.py",
    "sharding.py", "context.py", "memory", "routing", "layers", "model.py",
}  # fmt: skip
BANK = {"checkpoints", "data", "bank", "inference", "ask", "plan", "parity"}


def test_what_is_imported_is_declared(root, declared):
    distributions = importlib.metadata.packages_distributions()
    for file in (*root.glob("msa_jax/**/*.py"), *root.glob("pallas_kernels/**/*.py"), *root.glob("*.py")):
        top, *rest = file.relative_to(root).parts
        room = rest[0] if top == "msa_jax" else "model.py" if top == "pallas_kernels" else "train"
        extra = "" if room in CORE else "bank" if room in BANK else "serve" if room == "serve" else "train"
        extra = "train" if rest == ["data", "pipeline.py"] else extra
        extra = "baselines" if rest == ["evaluation", "baselines.py"] else extra
        for name in {name.split(".")[0] for name in imports([file], root)} - OWN - sys.stdlib_module_names:
            names = {normal(each) for each in distributions.get(name, [name])}
            assert names & declared[extra], f"{file} imports {name}, which setup.cfg does not name for [{extra}]"


def test_a_missing_extra_is_one_sentence_that_names_it(root, declared):
    """For Python callers and in commands; and what is looked for is what setup.cfg installs."""
    distributions = importlib.metadata.packages_distributions()
    for extra, modules in EXTRAS.items():
        assert all({normal(each) for each in distributions[name]} & declared[extra] for name in modules)
    code = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("tokenizers", "grain", "uvicorn") else find(name, *rest)
import msa_jax.model
for name in ("MemoryStore", "Session"):
    try:
        getattr(msa_jax, name)
    except ImportError as e:
        print(e)
for name in ("bank", "ask", "serve", "train", "export"):
    try:
        runpy.run_module(f"msa_jax.{name}", run_name="__main__")
    except SystemExit as e:
        print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    need = "{} not installed: pip install 'msa-jax[{}]' adds it."
    bank = need.format("tokenizers", "bank")
    assert done.stdout.splitlines() == [
        bank, bank, f"bank: {bank}", f"ask: {bank}", "serve: " + need.format("tokenizers, uvicorn", "serve"),
        "train: " + need.format("tokenizers, grain", "train"), f"export: {bank}",
    ], done.stderr  # fmt: skip
