"""`datasets` reads pools and kept trajectories. Skipped without it:

pip install datasets pytest; python -m pytest tests/test_datasets_library.py
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from helpers.episodes import make_env, singers
from helpers.kept_records import group, record, write_kept
from helpers.models import tiny_tokenizer
from helpers.pages import ROOT
from helpers.pools import trajectory_of
from mtsql.model.rendering import Renderer
from mtsql.rl.pool import pool_record, write_pool

pytestmark = pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is written beside the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def is_same(read: Any, kept: Any) -> bool:
    """Whether a value was read as it was kept. A key that it did not have is null."""
    if isinstance(kept, dict):
        return kept.keys() <= read.keys() and all(is_same(read[k], kept.get(k)) for k in read)
    if isinstance(kept, list):
        return len(read) == len(kept) and all(map(is_same, read, kept))
    return read == kept


def test_a_pool_is_read_unchanged(tmp_path):
    from datasets import load_dataset

    renderer = Renderer(tiny_tokenizer())
    database = singers(tmp_path / "singers.sqlite")
    records = [
        pool_record(trajectory_of(make_env(database, **settings), renderer), renderer, number)
        for number, settings in enumerate(
            [{"style": "brief"}, {"style": "full", "history": (("who ?", "SELECT 1"),)}]
        )
    ]
    assert [one["tools"] is None for one in records] == [True, False]
    write_pool(tmp_path / "pool.jsonl", records)
    read = load_dataset("json", data_files=str(tmp_path / "pool.jsonl"), split="train")
    assert list(read) == records


def test_the_code_of_the_page_reads_updates_and_evaluations(tmp_path, monkeypatch):
    """The evaluation comes first, where answers failed, and has fewer components."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/rl/trajectories")
    failed = record(part="dev", is_right=False, answer="", answer_result=None)
    shaped = group(update=1, components={"ex": 1.0, "em": 0.0, "propose": 0.25})
    write_kept(folder / "dev-00000.jsonl.gz", [[failed]])
    write_kept(folder / "update-00001.jsonl.gz", [shaped])
    text = (ROOT / "docs/trajectories.md").read_text()
    [block] = re.findall(r"```python\n([^`]*load_dataset.*?)```", text, flags=re.S)
    names: dict[str, Any] = {}
    exec(compile(block, "trajectories.md", "exec"), names)
    assert len(names["kept"]) == 1 + len(shaped) and names["rows"] == [failed, *shaped]
    assert all(map(is_same, names["kept"], names["rows"]))
    assert names["kept"][0]["components"] == {"ex": 0.0, "em": 0.0, "propose": None}
