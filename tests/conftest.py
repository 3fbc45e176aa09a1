"""What every test runs under: two CPU devices, strict shapes, fp32 matrix products; and the test data."""

import os
import pathlib

# Before JAX is imported. Two devices, so that sharded code shards; more would only slow two cores down.
# A caller's own setting wins: JAX_PLATFORMS=cuda runs the tests on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# The interpreter of GPU kernels runs every warpgroup as a thread that may wait for another one, and holds a thread of
# XLA's pool meanwhile. The pool has one a core, and on few cores none is left to wait for.
os.environ.setdefault("NPROC", "16")
# Most of the time of a test is compilation, and machine code for tiny arrays need not be fast. Of processes too.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=2"]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# The time of a first call is compilation, so there is no deadline. CI sees the same examples every time.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable" if os.environ.get("CI") else "local")

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="session")
def programs_are_compiled_once(tmp_path_factory):
    """Models that are made anew for each test run the same programs: a worker compiles each of them once.

    Every worker has a folder of its own: one would read what another is still writing.
    """
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(autouse=True)
def programs_are_not_kept(monkeypatch):
    """A command that is called here would have all that is compiled from then on kept in the user's folder."""
    monkeypatch.setattr("msa_jax.cli.compilation.keep_programs", lambda folder: None)


@pytest.fixture(scope="module")
def optimised():
    """Compile as outside of tests: for what is measured of executables."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def compiled():
    """Durations of all that is compiled, or read from the cache, from here on; a list that may be cleared."""
    durations = []

    def note(event, duration, **_):
        if "backend_compile" in event:
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield durations
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
    """The optional folder of recorded tensors and data sets: MSA_TEST_DATA, else ../shared, else a skip.

    An MSA_TEST_DATA that is not a folder fails the test: a slip of the pen must not look like a skip.
    """
    named = os.environ.get("MSA_TEST_DATA")
    if named is not None:
        folder = pathlib.Path(named)
        if not folder.is_dir():
            pytest.fail(f"MSA_TEST_DATA is {named!r}, which is not a folder: correct or unset it.")
        return folder
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no test data: set MSA_TEST_DATA to the folder that holds it")
    return folder
