"""Double precision for exact comparisons, and programs that compile in half the time."""

import jax
import pytest


@pytest.fixture
def x64():
    """64-bit types inside one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Most of the time goes to XLA's optimiser, and these programs run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
