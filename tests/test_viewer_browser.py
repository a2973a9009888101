"""The page of `mtsql view` in a real browser: every control works, data stays text, and thousands
of trajectories do not slow it down."""

import pytest

from helpers.browser import CHROMIUM, browser
from helpers.kept_records import group, write_run
from mtsql.viewer.page import PageData, page_text
from mtsql.viewer.read import kept_files, read_records

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]
READY = "document.documentElement.dataset.ready === 'yes'"
HOSTILE = '<img src=x onerror="document.title = 1"></script><script>document.title = 2</script>'


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


def written(folder, data: PageData):
    file = folder / "view.html"
    file.write_text(page_text(data))
    return f"file://{file}"


def two_runs(folder) -> PageData:
    data = PageData(["runs/a", "runs/b"])
    for number, updates in enumerate((range(1, 3), range(2, 4))):
        for file in kept_files(write_run(folder / str(number), updates)):
            data.add(number, read_records(file.path))
    return data


def count(page, selector: str) -> int:
    return page.run(f"document.querySelectorAll('{selector}').length")


def choose(page, name: str, value: str) -> int:
    """Choose a filter's value; how many groups are listed then."""
    page.run(
        f"(() => {{ const one = document.querySelector('#filters [name={name}]');"
        f"if (one.type === 'checkbox') one.click(); else {{ one.value = '{value}';"
        "for (const kind of ['input', 'change']) one.dispatchEvent(new Event(kind)); } })()"
    )
    return page.run("list.groups.length")


def test_filters_and_keys(page, tmp_path):
    page.resize(1300, 900)
    page.open(written(tmp_path, two_runs(tmp_path)), READY)
    everything = page.run("data.groups.length")
    assert everything == 44 and page.run("list.groups.length") == everything
    for name, value, expected in (
        ("run", "B", 22),
        ("part", "dev", 8),
        ("update", "2", 22),
        ("hardness", "easy", None),
        ("turn", "3", 12),
        ("database", "db1", None),
        ("ending", "max_replies", None),
        ("right", "right by EX", None),
        ("change", "mended", None),
        ("least", "2.9", None),
        ("most", "0.1", None),
        ("spread", "", 36),
    ):
        found = choose(page, name, value)
        assert 0 < found < everything and expected in (None, found), name
        page.point("#clear", click=True)
        assert page.run("list.groups.length") == everything, name
    page.key("/")
    for letter in "train:2:1":
        page.key(letter)
    assert page.wait("list.groups.length === 4")
    page.key("Escape")
    page.point("#clear", click=True)

    page.run(
        "goTo(data.groups.findIndex((one) => one.turn_id === 'train:0:1' && one.update === 2))"
    )
    page.wait("!!document.querySelector('.sample')")
    assert page.run("document.querySelector('h2').textContent") == "question 1 of dialogue 0"
    assert count(page, ".replies > li") == 2 and count(page, ".clauses tr.differs") == 0
    for _ in range(3):
        page.key("l")
    page.wait("document.querySelectorAll('.clauses tr.differs').length === 1")
    assert "'France'" in page.run("document.querySelector('tr.differs').textContent")
    page.key("s")
    page.wait("document.querySelectorAll('.sample').length === 4")
    page.key("v")
    page.wait("document.querySelectorAll('.sample').length === 2")
    titles = page.run("[...document.querySelectorAll('h3')].map((one) => one.textContent).join()")
    assert titles.index("run A") < titles.index("run B")
    page.key("v")
    page.key("]")
    page.wait("document.querySelector('h2').textContent === 'question 2 of dialogue 0'")
    page.key("[")
    page.key("k")
    page.wait("document.querySelector('h2').textContent === 'question 0 of dialogue 0'")
    page.key("?")
    assert page.run("document.getElementById('help').open")
    page.key("Escape")
    page.wait("!document.getElementById('help').open")
    before = page.run("getComputedStyle(document.body).backgroundColor")
    page.key("m")
    assert page.run("getComputedStyle(document.body).backgroundColor") != before
    page.key("f")
    assert page.run("getComputedStyle(document.getElementById('filters')).display") == "none"
    assert not page.errors and all(one.startswith("file:") for one in page.requests)


def test_every_colour_of_the_token_layer(page, tmp_path):
    page.open(written(tmp_path, two_runs(tmp_path)), READY)
    page.run("goTo(data.groups.findIndex((one) => one.turn_id === 'train:0:1'))")
    page.wait("!!document.querySelector('.sample')")
    page.key("t")
    page.wait("!!document.querySelector('.tokens')")
    whole = page.run("document.querySelector('.tokens').textContent")
    assert whole.startswith("<think>The country is missing.</think>") and "</answer_sql>" in whole
    legends = set()
    for layer in ("trained", "logprob", "entropy", "ratio", "advantage", "credit"):
        page.point(f"[data-layer={layer}]", click=True)
        page.wait(f"document.querySelector('[data-layer={layer}]').ariaPressed === 'true'")
        assert count(page, ".t:not(.env)[style*=background]") > 10, layer
        assert not count(page, ".t.env[style]"), layer
        legends.add(page.run("document.querySelector('.legend').textContent"))
    assert len(legends) == 6
    page.point(".t:not(.env)")
    tip = page.wait(
        "!document.getElementById('tip').hidden && document.getElementById('tip').textContent"
    )
    for name in ("log-prob", "entropy", "ratio", "advantage +0.5", "credit +0.2", "trained on"):
        assert name in tip, name
    page.key(".")
    assert page.run("document.getElementById('tip').textContent") != tip
    page.key("Escape")
    assert page.run("document.getElementById('tip').hidden")
    assert not page.errors


def test_what_shows_nothing_is_shown(page, tmp_path):
    """Line ends, control characters, and characters that turn the text around them."""
    ends = {"tokens": ["\n"] * 3, "ids": [1] * 3, "loss_mask": [1] * 3, "logprobs": [0.0] * 3}
    [one] = group(0, 0, 1, question="a\u202eb\x1b[31m \U0001f469\u200d\U0001f680")
    reply = one["replies"][0] | {"start": 0, "end": 3, "think": "", "sql": "", "result": None}
    data = PageData(["runs/a"])
    data.add(0, [one | ends | {"replies": [reply]}])
    page.open(written(tmp_path, data), READY)
    page.key("j")
    assert page.wait("document.querySelector('#detail h2')?.textContent") == (
        "a\\u202eb\\x1b[31m \U0001f469\u200d\U0001f680"
    )
    assert 'Only white space: "\\n\\n\\n"' in page.run("byId('detail').textContent")
    page.key("t")
    page.wait("!!document.querySelector('.tokens')")
    assert page.run("document.querySelector('.tokens').textContent") == "\u21b5\n" * 3
    assert not page.errors


def test_each_evaluation_of_a_training_run_has_its_update(page, tmp_path):
    data = PageData(["runs/a", "runs/eval"])
    for run, update, part in ((0, 0, "dev"), (0, 2, "dev"), (1, 0, "dev")):
        data.add(run, group(0, 0, 1, update=update, part=part))
    page.open(written(tmp_path, data), READY)
    names = page.run("data.groups.map(nameOf)")
    assert names == ["run A, dev, update 0", "run A, dev, update 2", "run B, dev"]
    assert page.run("byId('title').textContent").startswith("A: runs/a, B: runs/eval ")


def test_a_damaged_group_is_named_and_the_others_are_shown(page, tmp_path):
    data = PageData(["runs/a"])
    for dialogue in range(2):
        data.add(0, group(dialogue, 0, 1))
    damaged = [one | {"replies": [None]} for one in group(2, 0, 1)]
    data.add(0, damaged)
    page.open(written(tmp_path, data), READY)
    page.run("goTo(2)")
    page.wait("byId('detail').textContent.includes('train:2:0 cannot be shown')")
    page.key("k")
    page.wait("!!document.querySelector('.sample')")
    assert not page.errors


def test_hostile_data_stays_text_at_every_width(page, tmp_path):
    data = PageData([f"runs/{HOSTILE}"])
    fields = {"question": HOSTILE, "db_id": HOSTILE, "gold_sql": HOSTILE, "answer": HOSTILE}
    fields |= {"prompt": HOSTILE * 200, "outcome": "x" * 300}
    data.add(0, group(0, 1, 3, cell=HOSTILE * 9, thought=HOSTILE, **fields))
    data.add(0, group(1, 0, 1, part="dev", cell=None, question="\u202e\x00\ud83d 漢字 " * 40))
    odd = group(2, 0, 2, tokens=[], ids=[], loss_mask=[], logprobs=[], replies=[], answer="")
    wide = {"status": "ok", "message": "", "num_rows": 10**6, "num_columns": 900}
    columns = [f"column {n}" for n in range(30)]
    wide |= {"columns": columns, "rows": [[f"{n}" for n in range(30)]] * 20}
    data.add(0, [one | {"gold_result": wide, "ratios": [], "entropies": []} for one in odd])
    address = written(tmp_path, data)
    for width in (1300, 390):
        page.resize(width, 800)
        page.open(address, READY)
        title = page.run("document.title")
        for place in range(3):
            page.run(f"goTo({place})")
            page.wait(f"document.getElementById('detail').shown === {place}")
            for key in "tcts":
                page.key(key)
            page.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
            assert page.run("document.documentElement.scrollWidth") <= width
            assert page.run("document.getElementById('detail').scrollWidth") <= width
        assert page.run("document.title") == title and "<img" in title
        assert count(page, "img, #detail script, iframe") == 0
    assert not page.errors and all(one.startswith("file:") for one in page.requests)


def test_thousands_of_trajectories(page, tmp_path):
    data = PageData(["runs/large"])
    for dialogue in range(50):
        data.add(0, group(dialogue, 0, 8))
    for update in range(2, 11):
        data.index += [about | {"update": update} for about in data.index[:50]]
        data.packed += data.packed[:50]
    assert data.num_trajectories == 4000
    page.resize(1300, 900)
    page.open(written(tmp_path, data), READY)
    assert 10 < count(page, ".row") < 60  # only what is seen exists
    took = page.run(
        "(() => { const start = performance.now(); for (let n = 0; n < 20; n++)"
        "{ filters.words = [String(n)]; showList(); } return (performance.now() - start) / 20; })()"
    )
    assert took < 200, f"a filter takes {took} ms"
    page.point("#clear", click=True)
    page.run("document.getElementById('list').scrollTop = 1e6")
    page.wait("[...document.querySelectorAll('.row')].some((one) => one.hash === '#499')")
    assert not page.errors
