"""What tests of asking have in common."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compiles():
    """Compile with little optimisation: of tiny models, most of the time is compilation."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
