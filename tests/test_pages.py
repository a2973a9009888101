"""The Python blocks of docs/ are executed, its data is read, and it explains every key of
metrics.jsonl."""

import ast
import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import train_rl

from helpers.adapter_folders import learner_logprobs
from helpers.collecting import scored
from helpers.episodes import answer, call, singers
from helpers.kept_records import write_run
from helpers.pages import PAGES, ROOT, blocks
from helpers.runs import FLAGS, SMALL_RL, finish, start
from mtsql.agent.env import Outcome, SqlEnv
from mtsql.agent.protocol import TAGS
from mtsql.agent.reply import Verdict, format_reply
from mtsql.engine.engine import Engine, EngineConfig
from mtsql.learner.logprobs import PolicyModule
from mtsql.learner.packing import Sample, pack
from mtsql.model.policy import (
    AdapterConfig,
    EmbeddedConfig,
    ModelConfig,
    build_embedded,
    load_policy,
    load_tokenizer,
    save_policy,
)
from mtsql.model.rendering import Renderer
from mtsql.model.tokenizer import train_tokenizer
from mtsql.model_notes import notes_of
from mtsql.not_finite import require_finite
from mtsql.rl.advantages import AdvantageConfig
from mtsql.rl.rollout import rollout
from mtsql.rl.update_metrics import update_metrics
from mtsql.run.ranks import Ranks
from mtsql.run.runlog import NotFinite
from mtsql.sql.dialogues import Turn, load_corpus
from mtsql.sql.query import QueryStatus

DOCS = ROOT / "docs"
EXECUTED = {"metrics.md", "serving.md", "trajectories.md", "warnings.md"}
SQL = "SELECT count(*) FROM singer"


def run_blocks(page: str) -> dict[str, object]:
    """Execute the Python blocks of a page in one namespace, which is returned."""
    names: dict[str, object] = {}
    for block in blocks(DOCS / page, "python"):
        exec(compile(block, page, "exec"), names)
    return names


def test_every_python_block_of_the_pages_is_executed_here():
    assert {page.name for page in PAGES if blocks(page, "python")} == EXECUTED


def explained_keys() -> dict[str, str]:
    """Key -> the line of docs/metrics.md that explains it."""
    section = (DOCS / "metrics.md").read_text().partition("## What does each key mean")[2]
    table = section.partition("\n## ")[0]
    found = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            for key in re.findall(r"`([\w/]+)`", line.split("|")[1]):
                assert key not in found, f"{key} is explained twice"
                found[key] = line
    return found


def unexplained(keys: set[str]) -> set[str]:
    """The keys that docs/metrics.md does not explain. `reward/NAME` stands for any component."""
    explained = explained_keys()
    patterns = [key.replace("NAME", r"\w+").replace("STATUS", r"\w+") for key in explained]
    return {key for key in keys if not any(re.fullmatch(p, key) for p in patterns)}


def test_every_metric_of_an_update_is_explained():
    group = [scored(0, Outcome.REPLY_TOKENS), scored(2)]
    step = dict.fromkeys(
        ("loss", "grad_norm", "num_computed", "num_distinct", "num_tokens", "logprob_gap"), 1.0
    )
    stats = dict.fromkeys(("clip_low", "clip_high", "ratio", "ratio_far", "entropy", "kl"), 1.0)
    config = AdvantageConfig(kl_coef=0.1)
    metrics = update_metrics([group], [], [step | stats], config, Ranks())
    assert not unexplained(set(metrics))
    assert unexplained({"reward_sum", "loss/entropi"}) == {"reward_sum", "loss/entropi"}


def keys_in(file: str, functions: tuple[str, ...] = ()) -> set[str]:
    """The constant keys of the dictionaries in a source file that have the key `stage` or are in
    one of the functions."""
    tree = ast.parse((ROOT / "src/mtsql" / file).read_text())
    places = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = [node for place in places if place.name in functions for node in ast.walk(place)]
    found: set[str] = set()
    for node in [*ast.walk(tree), *inside]:
        if isinstance(node, ast.Dict):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            found |= keys if "stage" in keys or node in inside else set()
    return found


def test_the_keys_that_the_sources_write_are_explained():
    files = ("rl_run.py", "eval_run.py", "rounds.py", "lines.py")
    written = {file: keys_in(file) for file in files}
    assert all(written.values()) and "history" in written["eval_run.py"]
    written["coverage"] = keys_in("rl/coverage.py", ("coverage_metrics",))
    written["rollouts"] = keys_in("rl/rollout_metrics.py", ("rollout_metrics", "rollout_rates"))
    written["collect"] = keys_in("rl/collect.py", ("collect",))
    for place, keys in written.items():
        assert keys and not unexplained(keys), place


@pytest.mark.slow
def test_the_explained_keys_are_those_of_a_run(tmp_path):
    finish(start(*FLAGS, "--curriculum.resample_rounds", "0", cwd=tmp_path, script=SMALL_RL))
    rows = [
        json.loads(line)
        for file in [
            *tmp_path.glob("runs/warm-start/*/metrics.jsonl"),
            tmp_path / "runs/rl/metrics.jsonl",
        ]
        for line in file.read_text().splitlines()
    ]
    keys = {key for row in rows for key in row}
    assert {row["stage"] for row in rows} >= {"sft", "eval", "rl"}
    assert not unexplained(keys)
    updates = [set(row) for row in rows if row["stage"] == "rl"]
    assert all(row == updates[0] for row in updates)
    for key, line in explained_keys().items():
        name = key.replace("NAME", "ex" if key.startswith("reward") else "answered")
        assert name.replace("STATUS", "ok") in keys or "(only with" in line, key


def test_the_warnings_and_outcomes_of_the_page_are_those_of_the_code():
    text = (DOCS / "warnings.md").read_text()
    for name in importlib.import_module("mtsql.rl.warnings").CHECKS:
        assert f"| `{name}` |" in text, name
    for name in re.findall(r"`(max_\w+|reply_tokens)`:", text):
        assert name in {outcome.value for outcome in Outcome}
    assert "| `queries/STATUS` |" in (DOCS / "metrics.md").read_text() and len(QueryStatus) == 5


def test_the_code_of_metrics_reads_the_rows_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = {"stage": "rl", "update": 1, "curriculum_stage": 0, "reward": 1.256, "num_steps": 1}
    Path("runs/rl").mkdir(parents=True)
    rows = [row, {"stage": "eval", "update": 1}]
    Path("runs/rl/metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    run_blocks("metrics.md")
    assert capsys.readouterr().out == "1 0 1.26 1\n"


def test_the_code_of_trajectories_reads_what_a_run_has_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/rl"), range(7, 8), num_dialogues=1, size=2)
    run_blocks("trajectories.md")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {line[1] for line in lines} == {"0", "1"}
    assert {line[2] for line in lines} == {"exec_sql", "answer"}
    assert all(int(line[-1]) > 0 for line in lines)


def test_the_code_of_warnings_reads_a_kept_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample = Sample([1, 2], [3], [1], advantages=[1.0], old_logprobs=[float("nan")])
    with pytest.raises(NotFinite):
        require_finite({"loss": float("nan")}, [sample], Ranks(), Path("runs/rl"), 7)
    assert run_blocks("warnings.md")["batch"].ids.tolist() == [1, 2, 3]
    assert capsys.readouterr().out == "['loss'] [0] 1\n"


def test_the_csv_of_the_data_page_is_a_corpus(tmp_path):
    [text] = blocks(DOCS / "data.md", "csv")
    (tmp_path / "train.csv").write_text(text)
    singers(tmp_path / "shop.sqlite")
    corpus = load_corpus(tmp_path / "train.csv", None, tmp_path)
    assert [len(dialogue.turns) for dialogue in corpus.dialogues] == [2, 1]
    assert not corpus.skipped


def shown_turn() -> Turn:
    """The turn of docs/serving.md."""
    return Turn("chat:0:0", 0, "shop", "how many singers are there ?", "", ())


def model_that_calls_and_answers(folder: Path, config: train_rl.Config, env: SqlEnv) -> None:
    """Save a small embedded model that has learned one episode by heart: a call, and an answer."""
    replies = [call(SQL, think="count"), answer(SQL, ran=Verdict.PASS)]
    texts = [format_reply(reply) for reply in replies]
    tokenizer = train_tokenizer([*texts, str(env.reset()[0])], 400, TAGS)
    renderer = Renderer(tokenizer)
    prompt = renderer.render_prompt(*env.reset())
    first, last = (renderer.render_reply(text) for text in texts)
    seen = renderer.render_observation(env.step(texts[0]))
    mask = [1] * len(first) + [0] * len(seen) + [1] * len(last)
    size = EmbeddedConfig(num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16)
    model = build_embedded(tokenizer, size, seed=1)
    [batch] = pack([Sample(prompt, first + seen + last, mask)], 4000)
    module = PolicyModule(model.train())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        logprobs, _ = module(batch)
        (-logprobs.mean()).backward()
        optimizer.step()
    assert logprobs.min() > -0.1
    save_policy(model, tokenizer, folder, notes=notes_of(config))


@pytest.mark.slow
def test_the_code_of_serving_gives_our_replies_and_the_merged_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = train_rl.Config().completed()
    Path("data/mine").mkdir(parents=True)
    database = singers(Path("data/mine/shop.sqlite"))

    def make_env(turn: Turn) -> SqlEnv:
        return SqlEnv(turn, database, config.env, config.style)

    folder = Path("runs/rl/model")
    model_that_calls_and_answers(folder, config, make_env(shown_turn()))
    shutil.copytree(folder, "models/base")
    adapted = load_policy(ModelConfig(path="models/base", lora=AdapterConfig(rank=4)))
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    tokenizer = load_tokenizer(str(folder))
    save_policy(adapted, tokenizer, Path("runs/lora/model"))

    names = run_blocks("serving.md")

    renderer = Renderer(tokenizer)
    ours = load_policy(ModelConfig(path=str(folder)))
    greedy = names["config"].sampling
    assert greedy.temperature == 0 and names["config"].style == config.style
    engine = Engine(ours.eval(), renderer.stop_ids, greedy, EngineConfig())
    [played] = rollout(
        engine,
        renderer,
        [shown_turn()],
        make_env,
        num_samples=1,
        seed=0,
        update=0,
        max_prompt_tokens=4000,
        judge=lambda trajectory: trajectory,
    )
    replies = [m["content"] for m in names["messages"] if m["role"] == "assistant"]
    spans = [played.ids[start:end] for start, end in played.reply_spans]
    assert replies == [renderer.decode(ids) for ids in spans] and len(replies) == 2
    assert names["env"].final_sql == played.env.final_sql == SQL
    last_prompt = names["ids"]["input_ids"][0].tolist()
    start = played.reply_spans[-1][0]
    assert last_prompt == played.prompt_ids + played.ids[:start]
    merged = load_policy(ModelConfig(path="runs/lora/merged"))
    assert learner_logprobs(merged) == pytest.approx(learner_logprobs(adapted), abs=1e-4)
    half = load_policy(ModelConfig(path="runs/rl/model-bf16"))
    assert learner_logprobs(half) == pytest.approx(learner_logprobs(ours), abs=0.2)
