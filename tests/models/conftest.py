"""Double precision for exact comparisons."""

import jax
import pytest


@pytest.fixture
def x64():
    """64-bit types inside one test."""
    with jax.enable_x64(True):
        yield
