"""The report of benchmarks/findings.py on verdicts with known effects."""

import gzip
import importlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RATES = {
    "base": 0.1,
    "round1": 0.3,
    "round2": 0.3,
    "round3": 0.45,
    "outcome": 0.6,
    "process": 0.75,
    "short-sft": 0.4,
    "short-rl": 0.9,
    "no-exec": 0.5,
}
"""The chance that a model is right on a turn."""
NUM_DIALOGUES = 40
RUNS = {
    "seeds": [
        {"seed": 0, "machine": {"cores": 2}, "versions": {"torch": "2"}},
        {"seed": 1, "machine": {"cores": 2}, "versions": {"torch": "2"}},
        {"seed": 2, "machine": {"cores": 8}, "versions": {"torch": "3", "git": "abc"}},
    ],
    "steps": [
        {
            "seed": 0,
            "name": "base",
            "command": ["python", "train_sft.py", "--seed=0"],
            "is_done": True,
            "secs": 65.0,
            "num_starts": 1,
            "flops": 2e12,
            "optimizer_steps": 7,
        },
        {
            "seed": 1,
            "name": "base",
            "command": ["python", "train_sft.py", "--seed=1"],
            "is_done": False,
            "secs": 5.0,
            "num_starts": 1,
        },
    ],
}


@pytest.fixture(scope="module")
def module() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of benchmarks/ by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module


def verdicts(module: Callable[[str], ModuleType]) -> list:
    """Three seeds, two splits, four turns a dialogue. A turn is right if its own number is below
    the rate, so the models differ in their rates only. `process` gains at turns 3 and 4."""
    kind = module("findings_data").Verdict
    rng = random.Random(0)
    hard = {
        (split, d, t): rng.random()
        for split in ("dev", "dev_seen")
        for d in range(NUM_DIALOGUES)
        for t in range(4)
    }
    rows = []
    for seed in range(3):
        for (split, d, t), number in hard.items():
            number = (number + rng.gauss(0, 0.05)) % 1
            common = {
                "seed": seed,
                "split": split,
                "turn_id": f"{split}:{d}:{t}",
                "turn": str(t + 1),
                "hardness": "easy" if t < 2 else "extra",
                "replies": 2,
            }
            for model, rate in RATES.items():
                if model == "process" and t < 2:
                    rate = RATES["round3"]
                right = int(number < rate)
                rows.append(
                    kind(
                        model=model,
                        history="gold",
                        ex=right,
                        em=right,
                        abilities=[1.0, None, rate, None, 0.5],
                        **common,
                    )
                )
            for at in (0, 20, 40):  # the ability rises with EX, and so does the aha share
                rate = 0.45 + at / 200
                rows.append(
                    kind(
                        model="process",
                        history="gold",
                        at=at,
                        ex=int(number < rate),
                        em=0,
                        abilities=[1.0, None, rate, None, 0.5],
                        is_aha=int(number < at / 400),
                        starts_bad=int(number < 0.2),
                        **common,
                    )
                )
            lost = int(number < RATES["process"] - (0.2 if t else 0))
            rows.append(
                kind(
                    model="process",
                    history="predicted",
                    ex=lost,
                    em=lost,
                    abilities=[None] * 5,
                    **common,
                )
            )
    return rows


@pytest.fixture(scope="module")
def made(module, tmp_path_factory):
    """The report's folder, written from the verdicts."""
    folder = tmp_path_factory.mktemp("report")
    data, report = module("findings_data"), module("findings_report")
    data.write(verdicts(module), RUNS, folder)
    read = data.read_verdicts(folder / data.VERDICTS)
    report.write_report(read, data.read_runs(folder), folder, num_resamples=100)
    return folder


def test_known_effects_are_found_and_their_intervals_hold_them(module):
    v = module("findings_verdicts").Verdicts(verdicts(module), 200)
    found = {one.number: one for one in module("findings_claims").findings(v)}
    assert list(found) == [1, 2, 4, 5, 6, 7, 8]
    chain = {one.name: one for one in found[1].comparisons}
    for name, gain in (("round1 - base", 20), ("round3 - round2", 15), ("outcome - round3", 15)):
        low, high = chain[name].found.interval
        assert low < gain < high and high - low < 14
        assert chain[name].answer == "holds"
    assert chain["round2 - round1"].found.value == 0
    assert chain["round2 - round1"].answer == "undecided"
    assert found[1].answer == "mixed: 3 hold, 2 undecided"

    horizon = {one.name: one for one in found[2].comparisons}
    assert horizon["process - short-rl"].answer == "reversed"
    assert horizon["round3 - short-sft-compute"].answer == "no figures"
    # round3 is better than short-sft, and two models are missing.
    assert found[2].answer == "mixed: 1 holds, 1 reversed, as far as there are figures"

    # process is 30 points above round3 at turns 3 and 4, and equal at turns 1 and 2.
    late = found[4].comparisons[0]
    assert late.found.interval[0] < 30 < late.found.interval[1] and late.answer == "holds"
    assert found[4].answer == "holds"
    more = found[5].comparisons[-1]
    assert more.name == "gain process - round3: out of domain - in domain"
    assert more.found.interval[0] < 0 < more.found.interval[1]
    by_stage, hard = found[6].comparisons
    assert by_stage.answer == "no figures" and hard.name == "process - outcome: hard and extra"
    assert hard.found.interval[0] < 15 < hard.found.interval[1]  # turns 3 and 4 are extra

    abilities = {one.name: one for one in found[7].comparisons}
    assert abilities["exec_verify"].found.value > 0.9
    assert abilities["call_execute"].found.value == 0  # it is the same everywhere
    assert abilities["memory_verify"].answer == "no figures"
    bad, repaired, *_ = found[8].others
    assert bad.found.value == 0 and bad.sign == "undecided"  # below 0.2 at each checkpoint
    # 0, then all that is below 0.1 of what is below 0.2
    assert repaired.found.value == pytest.approx(50, abs=10) and repaired.sign == "above 0"
    ahas, no_exec, *_, history = found[8].comparisons
    assert ahas.found.interval[0] < 10 < ahas.found.interval[1] and ahas.answer == "holds"
    assert no_exec.found.value == pytest.approx(10, abs=5)
    assert history.found.value == pytest.approx(10, abs=5)
    assert history.found.count == 3 * 2 * NUM_DIALOGUES * 3  # without first turns


def test_the_report_is_made_again_from_its_files_alone(module, made, monkeypatch):
    page = (made / "README.md").read_text()
    assert "| process - base | +49.7 [" in page and "| holds |" in page
    assert "Seeds 0, 1, 2; 320 held-out turns" in page
    [row] = [line for line in page.splitlines() if line.startswith("| round3 - base | +")]
    effect, seeds, turns, answer = row.split(" | ")[1:]
    by_seed = [float(value) for value in seeds.split(", ")]
    assert float(effect.split()[0]) == pytest.approx(sum(by_seed) / 3, abs=0.1)
    assert (turns, answer) == ("960", "above 0 (not claimed) |")
    [row] = [line for line in page.splitlines() if line.startswith("| outcome - short-rl |")]
    assert row.endswith("| below 0 (not claimed) |")
    assert len(page.splitlines()) <= 120
    assert "| extra |" in (made / "tables.md").read_text()
    assert "`real.json` is missing" in page
    assert "1 of 2 steps are not finished" in page
    commands = (made / "commands.md").read_text()
    assert "| base | 1:05 | not done | 2.0, - | 7 |" in commands
    assert "- seeds 0, 1: torch 2; 2 cores\n- seed 2: torch 3, git abc; 8 cores\n" in commands
    files = ("README.md", "tables.md", "commands.md", "chain.png", "gains.png", "along.png")
    before = {name: (made / name).read_bytes() for name in files}
    for name in files:
        (made / name).unlink()
    again = ["report", f"--folder={made}/no-runs", f"--report_folder={made}", "--resamples=100"]
    assert module("findings").main(again) == 0
    assert {name: (made / name).read_bytes() for name in files} == before
    (made / "notes.md").write_text("Written by hand.\n")
    assert module("findings").main(again) == 0
    assert "\n\nWritten by hand.\n\n## 1. " in (made / "README.md").read_text()
    (made / "notes.md").unlink()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("runs.json", {**RUNS, "steps": []}, "has 0 steps of the seeds"),
        ("runs.json", {"seeds": RUNS["seeds"][:1], "steps": RUNS["steps"][:1]}, "seeds .0, 1, 2.,"),
        ("verdicts.jsonl.gz", b"", r"has verdicts of the seeds \[\], and runs.json"),
        ("notes.md", b"caf\xe9", "notes.md"),
        ("notes.md", None, "notes.md"),
    ],
)
def test_files_that_are_not_of_one_report_are_refused_before_a_page_is_written(
    module, made, tmp_path, file, content, words
):
    folder = tmp_path / "report"
    folder.mkdir()
    for name in ("runs.json", "verdicts.jsonl.gz"):
        (folder / name).write_bytes((made / name).read_bytes())
    if content is None:
        (folder / file).mkdir()
    elif isinstance(content, bytes):
        is_packed = file.endswith(".gz")
        (folder / file).write_bytes(gzip.compress(content) if is_packed else content)
    else:
        (folder / file).write_text(json.dumps(content))
    before = sorted(path.name for path in folder.iterdir())
    data, report = module("findings_data"), module("findings_report")
    with pytest.raises(ValueError, match=words):
        read = data.read_verdicts(folder / data.VERDICTS)
        report.write_report(read, data.read_runs(folder), folder, num_resamples=10)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_finding_about_a_real_model_takes_its_figures_from_real_json(module):
    third = module("findings_report").third_finding
    figures = {"model": "M", "data": "sparc dev", "turns": 10, "ex": 0.0, "ex_interval": None}
    figures |= {"answered": 3.0, "answered_interval": [1.0, 6.0]}
    found = third({"untrained": figures})
    assert found.answer == "holds"
    assert "*episodes that end with an answer* 3.0 % [1.0, 6.0], EX 0.0: M," in found.sentence
    assert "upper bound" not in found.sentence
    none = third({"untrained": {**figures, "answered": 0.0, "answered_interval": [0.0, 0.0]}})
    assert "upper bound for 10 independent turns is 26 %" in none.sentence
    for answered, ends, answer in (
        (80.0, [70.0, 90.0], "reversed"),
        (45.0, [40.0, 52.0], "undecided"),
    ):
        other = {**figures, "answered": answered, "answered_interval": ends}
        assert third({"untrained": other}).answer == answer
    assert third({"untrained": {}}).answer == third(None).answer == "no figures"
    with pytest.raises(ValueError, match="untrained.ex is missing"):
        third({"untrained": {"model": "M", "data": "d", "turns": 10}})


def test_unreadable_files_are_named(module, tmp_path):
    data, made = module("findings_data"), tmp_path
    (made / "verdicts.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="verdicts.jsonl.gz: cannot be read"):
        data.read_verdicts(made / data.VERDICTS)
    (made / "verdicts.jsonl.gz").write_bytes(gzip.compress(json.dumps({"seed": 0}).encode()))
    with pytest.raises(ValueError, match="line 1: no verdict"):
        data.read_verdicts(made / data.VERDICTS)
    torn = gzip.compress(b"{}" * 1000)
    for damaged in (torn[:-9], torn[:15] + b"!!" + torn[17:]):
        (made / "verdicts.jsonl.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match="verdicts.jsonl.gz: cannot be read"):
            data.read_verdicts(made / data.VERDICTS)
    (made / "runs.json").write_text('{"seeds": []}')
    with pytest.raises(ValueError, match="runs.json: steps is missing"):
        data.read_runs(made)
    words = ["report", f"--folder={made}/x", f"--report_folder={made}/y"]
    with pytest.raises(ValueError, match="run the steps first"):
        module("findings").main(words)


STEP = RUNS["steps"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": None}, "runs.json: steps is None: expected list"),
        ({"steps": [{}]}, r"runs.json: steps\[0\]: seed is missing"),
        ({"steps": [3]}, r"runs.json: steps\[0\] is 3: expected an object"),
        (
            {"steps": [STEP | {"command": None}]},
            r"runs.json: steps\[0\]: command is None: expected list",
        ),
        (
            {"steps": [STEP | {"command": [1]}]},
            r"runs.json: steps\[0\].command is \[1\]: expected a list of",
        ),
        ({"steps": [STEP | {"is_done": 1}]}, r"runs.json: steps\[0\]: is_done is 1: expected bool"),
        ({"steps": [STEP | {"seed": "0"}]}, r"runs.json: steps\[0\]: seed is '0': expected int"),
        ({"steps": [STEP | {"flops": "9"}]}, r"steps\[0\]: flops is '9': expected int or float"),
        ({"seeds": [{"seed": 0, "machine": {}}]}, r"runs.json: seeds\[0\]: versions is missing"),
    ],
)
def test_a_damaged_runs_json_is_named(module, tmp_path, change, words):
    (tmp_path / "runs.json").write_text(json.dumps(RUNS | change))
    with pytest.raises(ValueError, match=words):
        module("findings_data").read_runs(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": "1"}, "gz, line 2: seed is '1': expected int"),
        ({"seed": True}, "line 2: seed is True: expected int"),
        ({"turn_id": 3}, "line 2: turn_id is 3: expected str"),
        ({"at": "8"}, "line 2: at is '8': expected int or null"),
        ({"abilities": [1.0]}, r"line 2: abilities is \[1.0\]: expected 5 numbers or null"),
        ({"abilities": ["a"] * 5}, "line 2: abilities is .*: expected 5 numbers or null"),
    ],
)
def test_a_damaged_verdict_is_named(module, tmp_path, change, words):
    data = module("findings_data")
    [good, *_] = verdicts(module)
    lines = [json.dumps(one) for one in (vars(good), vars(good) | change)]
    (tmp_path / data.VERDICTS).write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(ValueError, match=words):
        data.read_verdicts(tmp_path / data.VERDICTS)
