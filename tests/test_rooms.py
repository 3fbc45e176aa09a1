"""The floor plan: which rooms there are, in what order, and that imports go one way everywhere."""

import ast
import pathlib

import pytest

# Rooms from the ground up, folders of `msa_jax` or files at its top: each may import those before it.
ORDER = (
    "errors", "importing", "files", "memory", "routing", "spec", "families", "config", "distributed", "sharding",
    "context", "layers", "model", "checkpoints",
    "data", "training", "runs", "cli", "export", "bank", "inference", "evaluation",
    "parity", "plan", "ask", "serve", "train", "eval",
)  # fmt: skip


def modules(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Every module of both packages, by dotted name."""
    files = [*root.glob("msa_jax/**/*.py"), *root.glob("pallas_kernels/**/*.py"), root / "train.py", root / "eval.py"]
    names = {}
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def imports(root: pathlib.Path) -> dict[str, set[str]]:
    """What each module imports of the two packages, at any depth of its code: modules, not the names in them."""
    known = modules(root)
    found = {}
    for module, file in known.items():
        found[module] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}: a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                while name and name not in known:
                    name = name.rpartition(".")[0]
                if name and name != module:
                    found[module].add(name)
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    state: dict[str, bool] = {}
    stack, found = [], []

    def visit(name):
        state[name] = False
        stack.append(name)
        for other in sorted(graph.get(name, ())):
            if state.get(other) is False:
                found.append([*stack[stack.index(other) :], other])
            elif other not in state:
                visit(other)
        state[name] = True
        stack.pop()

    for name in sorted(graph):
        if name not in state:
            visit(name)
    return found


@pytest.fixture(scope="module")
def graph(root):
    return imports(root)


def room_of(module: str) -> str | None:
    """The room of a module of `msa_jax`; None for `msa_jax` itself, which is the door."""
    parts = module.split(".")
    return parts[1] if parts[0] == "msa_jax" and len(parts) > 1 else None


def test_every_room_has_its_place(graph):
    assert {room_of(module) for module in graph} - {None} == set(ORDER)


def test_imports_go_one_way(graph):
    upward = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if room_of(module)
        and (not room_of(other) and other.startswith("msa_jax") or other in ("train", "eval")
             or room_of(other) and ORDER.index(room_of(other)) > ORDER.index(room_of(module)))
    ]  # fmt: skip
    assert upward == []


def test_kernels_know_arrays_only(graph):
    assert [m for m, others in graph.items() if m.startswith("pallas_kernels") for o in others if room_of(o)] == []


def test_there_is_no_circle(graph):
    # A package's own `__init__` offers what its modules hold, which is no dependence of it on them.
    own = lambda module, other: other.startswith(f"{module}.")  # noqa: E731
    assert circles({m: {o for o in others if not own(m, o)} for m, others in graph.items()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]


def test_there_are_at_most_six_errors(root):
    tree = ast.parse((root / "msa_jax/errors.py").read_text())
    base, *children = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert base.name == "MSAError" and 0 < len(children) <= 6
    assert all(child.bases[0].id == "MSAError" for child in children)
