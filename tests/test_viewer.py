"""The page of `mtsql view` without a browser: what is read, compared and written."""

import base64
import gzip
import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

from helpers.kept_records import GOLD, WRONG, group, record, write_kept, write_run
from mtsql.__main__ import main
from mtsql.rl.kept import packed
from mtsql.viewer.clauses import compared
from mtsql.viewer.page import SCRIPTS, PageData, page_text
from mtsql.viewer.read import KeptFile, kept_files, read_records, spread_places, that_fit

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">{{groups}}<!--'


def unpacked(text: str):
    return json.loads(gzip.decompress(base64.b64decode(text)))


def part_of(page: str, name: str) -> str:
    return re.search(rf'id="{name}">([^<]*)</script>', page)[1]


def test_clauses_differ_only_where_they_mean_something_else():
    found = {name: differs for name, _, _, differs in compared(GOLD, WRONG)}
    assert found == {"select": False, "from": False, "where": True, "group by": False}
    texts = {name: (a, b) for name, a, b, _ in compared("SELECT a", "SELECT a FROM t LIMIT 1")}
    assert texts == {"select": ("SELECT a",) * 2, "from": ("", "FROM t"), "limit": ("", "LIMIT 1")}


@pytest.mark.parametrize(
    ("gold", "answer", "differing"),
    [
        ("SELECT a, b FROM t", "select  b , A from T;", []),
        ("SELECT a FROM t WHERE x = 'A' AND y = 1", 'SELECT a FROM t WHERE y = 1 AND x = "A"', []),
        ("SELECT a FROM t WHERE x = 'a'", "SELECT a FROM t WHERE x = 'A'", ["where"]),
        ("SELECT a FROM t ORDER BY a, b", "SELECT a FROM t ORDER BY b, a", ["order by"]),
        ("SELECT a FROM t WHERE x IN (SELECT y FROM u)", "SELECT a FROM t", ["where"]),
        ("SELECT a FROM t UNION SELECT b FROM u", "SELECT a FROM t", ["union"]),
        ("SELECT a FROM t -- why", "SELECT a FROM t", []),
        ("SELECT (((", ")))", ["select", "query"]),
        ("", "SELECT 1", ["select"]),
    ],
)
def test_which_clauses_differ(gold, answer, differing):
    assert [name for name, _, _, differs in compared(gold, answer) if differs] == differing


def test_a_long_query_is_one_clause():
    [(name, *_, differs)] = compared("SELECT 1", "(" * 30_000)
    assert name == "query" and differs


def test_no_text_of_the_data_is_html(tmp_path):
    hostile = record(cell=HOSTILE, thought=HOSTILE, question=HOSTILE, db_id=HOSTILE)
    data = PageData([f"runs/{HOSTILE}", "runs/\udcff"])  # a name that is not UTF-8
    data.add(0, [hostile | {"answer": "half \ud83d"}])
    page = page_text(data)
    assert "alert" not in page.replace("&lt;/script&gt;&lt;script&gt;alert", "").replace(
        "onerror=&quot;alert", ""
    )
    assert page.count("<script") == page.count("</script>") == 3
    index = unpacked(part_of(page, "index"))
    assert (
        index["runs"] == [f"runs/{HOSTILE}", "runs/?"] and index["groups"][0]["question"] == HOSTILE
    )
    shown = unpacked(part_of(page, "groups"))
    assert shown["samples"][0]["replies"][0]["result"]["rows"][0][0] == HOSTILE
    assert "prompt_ids" not in shown["samples"][0]
    assert "http" not in re.sub(r'http-equiv|<script type="text/plain".*', "", page)


def test_the_pages_script_never_writes_html():
    for file in (*(f"{name}.js" for name in SCRIPTS), "page.html", "style.css"):
        text = (files("mtsql.viewer") / file).read_text()
        assert len(text.splitlines()) <= 400
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in text, file


def test_siblings_are_one_group_wherever_their_lines_are(tmp_path):
    one, other = group(0, 0, 3), group(1, 0, 2)
    data = PageData(["r"])
    data.add(0, [one[2], other[1], one[0], other[0], one[1]])
    found = [(len(about["samples"]), about["turn_id"]) for about in data.index]
    assert found == [(3, "train:0:0"), (2, "train:1:0")] and data.num_trajectories == 5
    assert [sample["sample"] for sample in data.index[0]["samples"]] == [0, 1, 2]


def test_the_command_writes_one_file(tmp_path, capsys):
    a, b = (write_run(tmp_path / name, range(1, 4)) for name in "ab")
    main(["view", str(a)])
    assert "112 trajectories of 31 groups" in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in a.iterdir() if path.is_file()] == ["view.html"]
    main(["view", str(a), str(b), "--out", str(tmp_path / "two.html"), "--updates", "1", "3"])
    index = unpacked(part_of((tmp_path / "two.html").read_text(), "index"))
    assert {about["update"] for about in index["groups"]} == {1, 3}
    assert {about["run"] for about in index["groups"]} == {0, 1}
    main(["view", str(a), "--max_mb", "0.004"])
    assert "are left out" in " ".join(capsys.readouterr().out.split())


def test_a_page_of_too_many_files_has_those_that_are_spread_over_the_run():
    files = [KeptFile(Path(f"r/update-{n:05d}.jsonl.gz"), 100) for n in range(1, 41)]
    files += [KeptFile(Path(f"r/dev-{n:05d}.jsonl.gz"), 100) for n in (0, 20, 40)]
    chosen = that_fit(files, 800)
    found = {part: [f.update for f in chosen if f.part == part] for part in ("update", "dev")}
    assert found == {"update": [1, 11, 21, 31, 40], "dev": [0, 20, 40]}
    assert that_fit(files, 1) == [files[-1]]
    assert sorted(spread_places(7)) == list(range(7)) and spread_places(1) == [0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "not compressed by gzip, or damaged: name a run folder"),
        (gzip.compress(b"{}\n", mtime=0)[:-9], "damaged"),
        (gzip.compress(b"{}\n", mtime=0), "line 1: not a trajectory"),
        (gzip.compress(b'{"format": 2}\n', mtime=0), "line 1: its format is 2"),
        (packed([record() | {"turn": "1"}]), "line 1: turn is '1'"),
        (packed([{"format": 1}]), "line 1: the key part is missing"),
        (gzip.compress(b"[1]\n", mtime=0), "line 1: not a trajectory"),
        (gzip.compress(b"{\n", mtime=0), "line 1: not JSON"),
        (gzip.compress(b"\xff\n", mtime=0), "damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    file = tmp_path / "update-00001.jsonl.gz"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(read_records(file))
    assert str(error.value).startswith(str(file)) and message in str(error.value)


def test_what_cannot_be_shown_is_a_line(tmp_path):
    run = write_run(tmp_path / "run", range(1, 3))
    (tmp_path / "empty").mkdir()
    write_kept(tmp_path / "none/trajectories/update-00001.jsonl.gz", [])
    for words, message in (
        ([], "view needs one run"),
        ([run, run], "both runs are"),
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path / "empty"], "trajectories.keep_frac is 0"),
        ([tmp_path / "none"], "are empty"),
        ([run, "--updates", "9"], "no trajectories of update 9"),
        ([run, "--max_mb", "0"], "max_mb is 0"),
        ([run, "--out", tmp_path], "is a folder"),
        ([run, "--out", run / "metrics.jsonl"], "so its name ends with .html"),
        (["x" * 300], "x: File name too long"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["view", *map(str, words)])
    assert not (run / "view.html").exists()
    assert len(kept_files(run / "trajectories/update-00001.jsonl.gz")) == 1
