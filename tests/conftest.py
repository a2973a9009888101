"""Fixtures every test file may use. No network, no GPU."""

from pathlib import Path

import pytest
from hypothesis import settings

SHARED = Path(__file__).resolve().parents[2] / "shared"
settings.register_profile("busy", deadline=None)  # a busy machine is not a failure
settings.load_profile("busy")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with official data and verdicts, where the checkout has one beside it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the official data folder ../shared is not beside this checkout")
    return SHARED
