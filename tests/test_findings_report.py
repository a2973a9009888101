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
    "machine": {"cores": 2},
    "versions": {"torch": "2"},
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
    assert chain["round2 - round1"].answer == "cannot be told"
    assert found[1].answer == "holds in part"

    horizon = {one.name: one for one in found[2].comparisons}
    assert horizon["process - short-rl"].answer == "does not hold here"
    assert horizon["round3 - short-sft-compute"].answer == "no figures"
    # round3 is better than short-sft, and two models are missing.
    assert found[2].answer == "holds in part, as far as there are figures"

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
    repaired = found[8].others[0]  # 0, then all that is below 0.1 of what is below 0.2
    assert repaired.found.value == pytest.approx(50, abs=10) and repaired.sign == "above 0"
    ahas, no_exec, *_, history = found[8].comparisons
    assert ahas.found.interval[0] < 10 < ahas.found.interval[1] and ahas.answer == "holds"
    assert no_exec.found.value == pytest.approx(10, abs=5)
    assert history.found.value == pytest.approx(10, abs=5)
    assert history.found.count == 3 * 2 * NUM_DIALOGUES * 3  # without first turns


def test_the_report_is_made_again_from_its_files_alone(module, made, monkeypatch):
    page = (made / "README.md").read_text()
    assert "*process - base* +49.7 [" in page and "| holds |" in page
    assert "Seeds 0, 1, 2; 320 held-out turns" in page
    [row] = [line for line in page.splitlines() if line.startswith("| round3 - base | +")]
    effect, seeds, turns, answer = row.split(" | ")[1:]
    by_seed = [float(value) for value in seeds.split(", ")]
    assert float(effect.split()[0]) == pytest.approx(sum(by_seed) / 3, abs=0.1)
    assert (turns, answer) == ("960", "(no claim) above 0 |")
    assert "Without a claim of the paper: *outcome - short-rl* below 0." in page
    assert len(page.splitlines()) <= 120
    assert "| extra |" in (made / "tables.md").read_text()
    assert "`real.json` is missing" in page
    assert "1 of 2 steps are not finished" in page
    assert "| base | 1:05 | not done | 2.0 | 7 |" in (made / "commands.md").read_text()
    files = ("README.md", "tables.md", "commands.md", "chain.png", "gains.png", "along.png")
    before = {name: (made / name).read_bytes() for name in files}
    for name in files:
        (made / name).unlink()
    again = ["report", f"--folder={made}/no-runs", f"--report_folder={made}", "--resamples=100"]
    assert module("findings").main(again) == 0
    assert {name: (made / name).read_bytes() for name in files} == before


def test_a_finding_about_a_real_model_takes_its_figures_from_real_json(module):
    third = module("findings_report").third_finding
    figures = {"model": "M", "data": "sparc dev", "turns": 10, "ex": 0.0, "ex_interval": None}
    figures |= {"answered": 3.0, "answered_interval": [1.0, 6.0]}
    found = third({"untrained": figures})
    assert found.answer == "holds"
    assert "*episodes that end with an answer* 3.0 % [1.0, 6.0], EX 0.0: M," in found.sentence
    for answered, ends, answer in (
        (80.0, [70.0, 90.0], "does not hold here"),
        (45.0, [40.0, 52.0], "cannot be told"),
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
    (made / "runs.json").write_text('{"machine": {}}')
    with pytest.raises(ValueError, match="runs.json: versions is missing"):
        data.read_runs(made)
    words = ["report", f"--folder={made}/x", f"--report_folder={made}/y"]
    with pytest.raises(ValueError, match="run the steps first"):
        module("findings").main(words)


def runs_of(seed: int) -> dict:
    """What runs.json holds for one seed with a step that depends on others."""
    place = f"runs/seed{seed}"
    commands = {
        "base": ["python", "train_sft.py", f"--seed={seed}", f"--run={place}/base"],
        "short": ["python", "x.py", f"--sft.epochs=1.2{seed}", f"--run={place}/short"],
    }
    steps = [
        {"seed": seed, "name": name, "command": words, "is_done": True, "secs": 1.0}
        for name, words in commands.items()
    ]
    steps[1]["equal"] = "--sft.epochs"
    return {"machine": {}, "versions": {}, "steps": steps}


def test_seeds_of_another_machine_are_kept(module, tmp_path):
    data = module("findings_data")
    by_seed = {seed: [v for v in verdicts(module) if v.seed == seed][:9] for seed in (0, 1, 2)}
    data.write(by_seed[2], runs_of(2), tmp_path)
    for seed in (0, 1):
        data.write(*data.with_other_seeds(by_seed[seed], runs_of(seed), tmp_path), tmp_path)
    found = data.read_verdicts(tmp_path / data.VERDICTS)
    assert found == by_seed[0] + by_seed[1] + by_seed[2]
    assert [step["seed"] for step in data.read_runs(tmp_path)["steps"]] == [0, 0, 1, 1, 2, 2]
    again, runs = data.with_other_seeds(by_seed[1][:3], runs_of(1), tmp_path)
    assert [v for v in again if v.seed == 1] == by_seed[1][:3] and len(runs["steps"]) == 6

    other = runs_of(3)
    other["steps"][0]["command"].append("--data.toy_folder=else")
    with pytest.raises(ValueError, match="base of seed 0 has another command than that of seed 3"):
        data.with_other_seeds([], other, tmp_path)
