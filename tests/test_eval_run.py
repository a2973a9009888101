"""eval.py from end to end on two small data sets, with an engine that plays a script."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import eval as eval_script
import pytest
import torch

from helpers.answering_engine import AnsweringEngine, engine_class
from helpers.episodes import answer, call, singers
from helpers.models import EMBEDDED, save_embedded
from helpers.runs import ROOT, launch
from mtsql import eval_run
from mtsql.agent.env import EnvConfig
from mtsql.agent.reply import Verdict
from mtsql.engine.sampling import SamplingConfig
from mtsql.judge.official_files import read_predictions
from mtsql.judge.score_files import score_files
from mtsql.model.flops import FlopMeter, ModelFlops
from mtsql.model.policy import ModelConfig, load_tokenizer
from mtsql.model.rendering import Renderer
from mtsql.run.signals import Terminated
from mtsql.sql.datasets import DataConfig

WHO, OLD, WHERE, LAST = "who is there ?", "who is old ?", "where from ?", "how many ?"
NAMES = "SELECT name FROM singer"
OLD_NAMES = "SELECT name FROM singer WHERE age > 30"
COUNTRIES = "SELECT country FROM singer"
COUNT = "SELECT count(*) FROM singer"
ANSWERS = {
    WHO: [[answer(COUNTRIES)], [answer(COUNT)], [answer(COUNT)], [answer(COUNT)]],  # all wrong
    OLD: [[call("SELECT nope"), call(OLD_NAMES, ran=Verdict.NO_PASS), answer(OLD_NAMES)]],  # aha
    WHERE: [[call(COUNTRIES), answer(COUNTRIES)]],
    LAST: [[answer(COUNT)], [answer(NAMES)], [answer(NAMES)], [answer(COUNT)]],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The data sets `near dev` (three turns) and `far dev` (one), and a model that is not asked."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "database").mkdir()
    singers(folder / "database/shows.sqlite")
    near = [(WHO, NAMES, 0), (OLD, OLD_NAMES, 0), (WHERE, COUNTRIES, 1), ("why ?", "", 1)]
    for name, turns in {"near": near, "far": [(LAST, COUNT, 0)]}.items():
        (folder / name).mkdir()
        lines = [f"shows,{question},{sql},{dialogue}" for question, sql, dialogue in turns]
        text = "\n".join(["db_id,question,sql,dialogue", *lines])
        (folder / name / "dev.csv").write_text(text + "\n")
    save_embedded(folder / "model", EMBEDDED)
    return folder


@pytest.fixture
def engines(world, monkeypatch, tmp_path):
    """The engines that an evaluation makes. The working directory is an empty folder."""
    made: list[AnsweringEngine] = []
    renderer = Renderer(load_tokenizer(str(world / "model")))
    monkeypatch.setattr(eval_run, "Engine", engine_class(ANSWERS, made, lambda: renderer))
    meter = FlopMeter(ModelFlops(per_token=2.0, per_pair=1.0, per_predicted=5.0), None)
    monkeypatch.setattr(eval_run, "flop_meter", lambda *_: meter)  # it would measure a matmul
    monkeypatch.chdir(tmp_path)
    return made


def run(world: Path, **keys: object) -> dict:
    """Evaluate and return scores.json, without the seconds, which are no two times the same."""
    config = config_of(world, **keys).completed()
    eval_script.main(config)
    scores = json.loads(Path(config.run, "scores.json").read_text())
    for result in scores["results"]:
        assert result.pop("secs")["wall"] > 0
    return scores


def config_of(world: Path, **keys: object) -> eval_script.Config:
    """The configuration of an evaluation of both data sets."""
    usual = {
        "model": ModelConfig(path=str(world / "model")),
        "data": DataConfig(dev=f"{world}/near/dev.csv", databases=f"{world}/database"),
        "out_of_domain": (f"{world}/far/dev.csv",),
        "style": "brief",
        "timed_turns": 0,
    }
    return eval_script.Config(**usual | keys)


def test_every_data_set_is_played_with_both_histories(world, engines, capsys):
    scores = run(world)
    results = scores["results"]
    assert [(r["data"], r["domain"], r["history"]) for r in results] == [
        ("near dev", "in-domain", "gold"),
        ("near dev", "in-domain", "predicted"),
        ("far dev", "out-of-domain", "gold"),
        ("far dev", "out-of-domain", "predicted"),
    ]
    near, own, far, _ = results
    assert scores["is_complete"] and near["skipped"] == 1 and far["skipped"] == 0
    assert near["all"]["ex"] == 66.67 and near["interaction"]["em"] == 50.0
    low, high = near["all"]["ex_interval"]
    assert low < 66.67 < high and far["all"]["ex_interval"] is None  # one dialogue has no spread
    assert near["aha"]["aha"] == {"num": 1, "of": 1, "percent": 100.0, "interval": None}
    assert near["aha"]["by_start"]["failed"]["of"] == 1 and near["aha"]["mended"] == 1
    assert near["errors"]["schema_linking"]["num"] == 1
    assert near["costs"]["calls"]["mean"] == 1.0 and near["costs"]["replies"]["mean"] == 2.0
    gold, predicted = ("".join(engine.prompts) for engine in engines[:2])
    assert NAMES in gold and COUNTRIES not in gold
    assert COUNTRIES in predicted and NAMES not in predicted
    assert [row["turn_id"] for row in own["turns"]] == ["dev:0:0", "dev:0:1", "dev:1:0"]
    files = Path("runs/eval/predictions")
    assert read_predictions(files / "near-dev-gold.sql") == [[COUNTRIES, OLD_NAMES], [COUNTRIES]]
    out = capsys.readouterr().out
    for text in ("near dev, gold: EX 66.7", "1 turns were not scored", "far dev, predicted"):
        assert text in out
    report = Path("runs/eval/report.md").read_text()
    assert "| aha, episodes | 1 of 1 | 1 of 1 |" in report and "schema_linking: it shows" in report
    assert "- parts: 4 of 4 are finished\n- decoding: greedy\n" in report


@pytest.mark.parametrize(("most", "num_skipped"), [(0, 1), (2, 0), (3, 1)])
def test_mtsql_score_gives_the_same_figures(world, engines, tmp_path, most, num_skipped):
    """Also of a part of the dialogues, which are spread over the databases. Dialogue 0 about `one`
    and dialogue 2 about `two` are the first; the turn without SQL is one of dialogue 1."""
    turns = [("one", WHO, NAMES, 0), ("one", OLD, OLD_NAMES, 0), ("one", WHERE, COUNTRIES, 1)]
    turns += [("one", "why ?", "", 1), ("two", LAST, COUNT, 2)]
    lines = [",".join(map(str, turn)) for turn in turns]
    (tmp_path / "dev.csv").write_text("\n".join(["db_id,question,sql,dialogue", *lines]))
    columns = [[-1, "*"], [0, "name"], [0, "country"], [0, "age"]]
    entry = {"table_names_original": ["singer"], "column_names_original": columns}
    entry |= {"column_types": ["text"] * 3 + ["number"], "primary_keys": [], "foreign_keys": []}
    entries = [entry | {"db_id": name} for name in ("one", "two")]
    Path("tables.json").write_text(json.dumps(entries))
    for one in entries:
        singers(tmp_path / f"{one['db_id']}.sqlite")
    data = DataConfig(dev="dev.csv", databases=".", tables="tables.json")
    [result] = run(world, data=data, out_of_domain=(), history="gold", max_dialogues=most)[
        "results"
    ]
    [gold] = Path("runs/eval/predictions").glob("*.gold.sql")
    predictions = gold.with_name(gold.name.replace(".gold", ""))
    report = score_files(gold, predictions, Path("tables.json"), [tmp_path])
    figures = report.summary.by_hardness["all"]
    assert figures.count == result["all"]["count"] == (3 if most == 2 else 4)
    assert round(100 * figures.ex, 2) == result["all"]["ex"]
    assert round(100 * figures.em, 2) == result["all"]["em"]
    assert result["skipped"] == num_skipped
    ids = [row["turn_id"] for row in result["turns"]]
    assert ids == sorted(ids)  # as in the file


def test_samples_vote_by_what_their_answers_return(world, engines):
    sampling = SamplingConfig(temperature=0.7)
    scores = run(world, num_samples=4, sampling=sampling, history="predicted")
    far = scores["results"][1]
    assert COUNT in "".join(engines[0].prompts)  # the answer to the first question, by vote
    assert far["samples"]["ex"]["pass"]["1"]["percent"] == 50.0
    assert far["samples"]["ex"]["pass"]["2"]["percent"] == pytest.approx(83.33)
    assert [far["samples"]["ex"]["vote"][k]["num"] for k in ("1", "2", "4")] == [1, 1, 1]
    assert far["turns"][0]["voted"] == 0 and len(far["turns"][0]["samples"]) == 4
    assert read_predictions(Path("runs/eval/predictions/far-dev-predicted-vote.sql")) == [[COUNT]]


def test_a_killed_evaluation_keeps_its_finished_parts(world, engines, monkeypatch):
    straight = run(world, run="runs/straight")
    play = eval_run.Matrix.play

    def interrupted(matrix, cell, *others):
        if cell.name == "far dev, gold":
            raise Terminated
        play(matrix, cell, *others)

    monkeypatch.setattr(eval_run.Matrix, "play", interrupted)
    with pytest.raises(Terminated, match="keeps 2 finished parts: continue with --resume runs/cut"):
        run(world, run="runs/cut")
    monkeypatch.setattr(eval_run.Matrix, "play", play)
    with pytest.raises(ValueError, match="history differs from .*config.yaml"):
        run(world, history="gold", resume="runs/cut")
    num_engines = len(engines)
    resumed = run(world, resume="runs/cut")
    assert len(engines) == num_engines + 2
    assert resumed["results"] == straight["results"] and resumed["is_complete"]
    assert len(Path("runs/cut/metrics.jsonl").read_text().splitlines()) == 4
    scores = Path("runs/cut/scores.json")
    hash_of_inputs = resumed["results"][0]["inputs"]
    scores.write_text(scores.read_text().replace(hash_of_inputs, "of other data"))
    with pytest.raises(ValueError, match="near dev, gold was played with other data"):
        run(world, resume="runs/cut")


def test_what_an_evaluation_depends_on_is_hashed(world, engines):
    """Data, prompts and weights."""
    hashes = set()
    other = save_embedded(world / "other", replace(EMBEDDED, num_layers=1))
    for keys in (
        {},
        {"env": EnvConfig(tools=("exec_sql",)), "style": "full"},
        {"model": ModelConfig(path=str(other))},
    ):
        accelerator = SimpleNamespace(main_process_first=nullcontext, device=torch.device("cpu"))
        accelerator.process_index, accelerator.num_processes = 0, 1
        config = config_of(world, run=f"runs/{len(hashes)}", **keys).completed()
        hashes.add(eval_run.open_matrix(config, accelerator).inputs["near dev"])
    assert len(hashes) == 3


def test_single_questions_are_timed_alone(world, engines):
    run(world, timed_turns=1, run="runs/timed")
    scores = json.loads(Path("runs/timed/scores.json").read_text())
    alone = [result["secs"]["alone"] for result in scores["results"]]
    assert [one["of"] for one in alone] == [1] * 4 and alone[0]["mean"] > 0
    assert alone[0] == alone[1] and alone[2] == alone[3]
    assert len(engines) == 6  # two data sets, each with two parts and one engine to measure


@pytest.mark.slow
def test_two_processes_score_as_one(world, monkeypatch, tmp_path):
    """With a real engine: the same samples, and so the same scores, in the same order."""
    monkeypatch.chdir(tmp_path)
    sampling = SamplingConfig(temperature=0.7, max_reply_tokens=8, max_trajectory_tokens=24)
    keys = {"num_samples": 2, "seed": 5, "sampling": sampling, "timed_turns": 2}
    alone = run(world, run="runs/one", **keys)
    (tmp_path / "two.yaml").write_text(Path("runs/one/config.yaml").read_text())
    flags = ["--num_processes", "2", "--cpu"]
    words = ["--config", "two.yaml", "--run", "runs/two"]
    done = launch(flags, ROOT / "eval.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    together = json.loads(Path("runs/two/scores.json").read_text())
    for result in together["results"]:
        assert result.pop("secs")["alone"]["of"] == min(2, result["all"]["count"])
    assert together["results"] == alone["results"]
    first = Path("runs/one/predictions/near-dev-gold-vote.sql").read_bytes()
    assert first == Path("runs/two/predictions/near-dev-gold-vote.sql").read_bytes()
