"""Fixtures that every test file may use. No network, no GPU."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from helpers.databases import SHOP, make_database, snapshot
from helpers.small_world import SMALL
from mtsql.sql import datasets

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side. With more threads than cores, torch's threads wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"
# Hypothesis reports slow examples as failures. On a busy machine every example may be slow.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, unless the test that needs one is asked for: the others are written for a CPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the test that needs a GPU where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no GPU, or not asked for by -m gpu"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with official data and verdicts, if the checkout has one beside it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the official data folder ../shared is not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """A run that is stopped in the process of the tests ignores signals from then on, which is for
    the end of a process. Here the next test has the handlers of before."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the precision of its first Accelerator. Here and afterwards it has none."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts write and read an embedded world of few databases."""
    monkeypatch.setattr(datasets, "WorldConfig", lambda: SMALL)


@pytest.fixture(scope="session")
def shop_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a folder, 100% odd?#")
    return make_database(folder / "shop & co.sqlite", SHOP)


@pytest.fixture
def shop(shop_file: Path) -> Iterator[Path]:
    """The database `SHOP`. Whatever the test does, its folder must stay the same, byte for byte."""
    before = snapshot(shop_file.parent)
    yield shop_file
    assert snapshot(shop_file.parent) == before
