"""A new tool, reward, loss, preset, data format or prompt is an edit in one file. Each test makes
the edit.

The copy of a single module is loaded beside the unchanged rest. Where other modules must see the
edit, a new process runs on a copy of the whole tree.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import train_rl

from helpers.episodes import GOLD, answer, call, make_env, play, singers
from mtsql.run.config import parse_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "mtsql"


def edited(text: str, *edits: tuple[str, str]) -> str:
    """The text after each `old` has become `new`; every `old` must stand in it exactly once."""
    for old, new in edits:
        assert text.count(old) == 1, f"{text.count(old)} times in the file: {old}"
        text = text.replace(old, new)
    return text


@pytest.fixture
def load(tmp_path, monkeypatch) -> Callable[..., ModuleType]:
    """Loads an edited copy of one module of the package."""

    def load(module: str, *edits: tuple[str, str]) -> ModuleType:
        file = tmp_path / Path(module).name
        file.write_text(edited((PACKAGE / module).read_text(), *edits))
        spec = importlib.util.spec_from_file_location(f"edited_{file.stem}", file)
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, loaded)
        spec.loader.exec_module(loaded)
        return loaded

    return load


def run_in_copy(folder: Path, module: str, edits: list[tuple[str, str]], program: str) -> dict:
    """Edits a module in a copy of the tree, runs a program there, and reads the JSON that it
    prints."""
    shutil.copytree(ROOT / "src", folder / "src")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    file = folder / "src" / "mtsql" / module
    file.write_text(edited(file.read_text(), *edits))
    path = os.pathsep.join([str(folder / "src"), str(folder)])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


NEW_TOOL = """def _list_tables(episode: Episode, arguments: dict[str, Any]) -> ToolResult:
    tables = episode.database.schema.tables[: arguments["limit"]]
    return ToolResult(", ".join(table.name for table in tables))


TOOLS: tuple[Tool, ...] = (
    Tool(
        name="list_tables",
        description="Return the names of the first tables.",
        parameters=(Parameter("limit", "integer", "How many names to return."),),
        run=_list_tables,
        step="Call list_tables if the schema is long.",
    ),
"""
USE_NEW_TOOL = """
import json, pathlib, sys
from mtsql.agent.env import EnvConfig, SqlEnv
from mtsql.agent.prompts import PromptStyle
from mtsql.rl.calls import calls_of
from mtsql.sql.dialogues import Turn
from mtsql.sql.schema import Column, Database, Schema, Table

tables = tuple(Table(name, (Column("a", "text"),)) for name in ("x", "y", "z"))
turn = Turn("d:0:0", 0, "d", "?", "SELECT a FROM x", ())
database = Database(Schema("d", tables), pathlib.Path("none.sqlite"))
config = EnvConfig(tools=("exec_sql", "list_tables"), malformed_call="observe")
env = SqlEnv(turn, database, config, "full")
messages, schemas = env.reset()
call = '<tool_call>{"name": "list_tables", "arguments": {"limit": %s}}</tool_call>'
print(json.dumps({
    "prompt": messages[0]["content"],
    "schema": schemas[1]["function"]["parameters"],
    "observed": [env.step(call % limit) for limit in ("2", '"two"')],
    "calls": [[found.tool, found.sql] for found in calls_of(env.records, config.tools)],
    "has_torch": "torch" in sys.modules,
}))
"""


def test_a_new_tool_is_an_entry_in_tools(tmp_path):
    edits = [("TOOLS: tuple[Tool, ...] = (\n", NEW_TOOL)]
    found = run_in_copy(tmp_path, "agent/tools.py", edits, USE_NEW_TOOL)
    assert "3. Call list_tables if the schema is long." in found["prompt"]
    assert (
        '\n- list_tables: Return the names of the first tables. Arguments: {"limit": INTEGER}.'
        in (found["prompt"])
    )
    assert found["schema"] == {
        "type": "object",
        "properties": {"limit": {"type": "integer", "description": "How many names to return."}},
        "required": ["limit"],
    }
    assert found["observed"] == [
        "x, y",
        'The arguments must be {"code": QUERY} or {"limit": INTEGER}.',
    ]
    assert found["calls"] == [["list_tables", None]] and not found["has_torch"]


NEW_REWARDS = '''
def thinks(trajectory: Trajectory, config: RewardConfig) -> float:
    """Text: whether every reply has a thought."""
    return float(all(record.reply.think for record in trajectory.env.records))


def short(trajectory: Trajectory, config: RewardConfig) -> float:
    """Tokens: one for none, half for ten."""
    return 10 / (10 + len(trajectory.ids))


def shortest(group: list[Trajectory], config: RewardConfig) -> list[float]:
    """A comparison within the group."""
    fewest = min(len(trajectory.ids) for trajectory in group)
    return [float(len(trajectory.ids) == fewest) for trajectory in group]


COMPONENTS: dict'''
GROUP = "GROUP_COMPONENTS: dict[str, Callable[[list[Trajectory], RewardConfig], list[float]]] = {"


def test_a_new_reward_is_a_function_and_a_weight(load, tmp_path):
    weights = "    thinks: float = 2.0\n    short: float = 4.0\n    shortest: float = 8.0\n\n"
    start = "    def __post_init__(self) -> None:\n        weights = ["
    rewards = load(
        "rl/rewards.py",
        ("\nCOMPONENTS: dict", NEW_REWARDS),
        (
            '    "overlong": overlong,\n',
            '    "overlong": overlong,\n    "thinks": thinks,\n    "short": short,\n',
        ),
        (GROUP, GROUP + '"shortest": shortest'),
        (start, weights + start),
    )
    database = singers(tmp_path / "shows.sqlite")
    group = []
    for think, num_tokens in (("hm", 10), ("", 30)):
        replies = [call(GOLD, think=think), answer(think=think)]
        trajectory = play(make_env(database), replies)
        trajectory.add_sampled([7] * num_tokens, [-1.0] * num_tokens)
        group.append(trajectory)
    config = rewards.RewardConfig()
    parts = [rewards.reward_components(trajectory, config) for trajectory in group]
    assert [(each["thinks"], each["short"]) for each in parts] == [(1.0, 0.5), (0.0, 0.25)]
    together = rewards.group_components(group, config)
    assert together == [{"shortest": 1.0}, {"shortest": 0.0}]
    before = rewards.total_reward({**parts[0], "thinks": 0.0, "short": 0.0}, config.weights)
    after = rewards.total_reward(parts[0] | together[0], config.weights)
    assert after == pytest.approx(before + 2.0 * 1.0 + 4.0 * 0.5 + 8.0 * 1.0)


def test_a_reward_without_a_weight_and_a_weight_without_a_reward_are_named(load):
    with pytest.raises(ValueError, match="RewardWeights has no field short"):
        load("rl/rewards.py", ('    "ex": ex,\n', '    "ex": ex,\n    "short": ex,\n'))
    start = "    ex: float = 1.0\n"
    with pytest.raises(ValueError, match="RewardWeights.short has no component"):
        load("rl/rewards.py", (start, "    short: float = 1.0\n" + start))


def test_a_new_loss_is_a_branch_of_policy_loss(load):
    branch = (
        '    if config.objective == "reinforce":\n        loss = -advantages * logprobs\n    el'
    )
    losses = load(
        "learner/losses.py",
        ('"clip", "cispo"', '"clip", "cispo", "reinforce"'),
        ('    if config.objective == "cispo":\n', branch + 'if config.objective == "cispo":\n'),
    )
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    batch = SimpleNamespace(
        old_logprobs=torch.tensor([-1.5, -2.0]), advantages=torch.tensor([0.5, -3.0])
    )
    config = losses.LossConfig(objective="reinforce", kl_coef=0.0)
    loss, stats = losses.policy_loss(logprobs, torch.zeros(2), batch, config)
    loss.backward()
    assert loss.item() == 0.5 - 6.0 and logprobs.grad.tolist() == [-0.5, 3.0]
    assert stats["logprob_gap"] == 0.5


def test_a_new_preset_is_a_recipe_in_their_folder(tmp_path):
    (tmp_path / "mine.yaml").write_text("loss: {kl_coef: 0.5}\n")
    config = parse_config(train_rl.Config, ["--preset", "mine"], "", tmp_path)
    assert (config.preset, config.loss.kl_coef) == ("mine", 0.5)
    with pytest.raises(ValueError, match="preset is dapo: expected one of mine or null"):
        parse_config(train_rl.Config, ["--preset", "dapo"], "", tmp_path)


NEW_FORMAT = '''def _read_pairs(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Blocks of three lines: database, question, SQL."""
    for number, block in enumerate(read_text(file).strip().split("\\n\\n"), 1):
        db_id, question, sql = block.split("\\n")
        yield f"{file}, block {number}", {"db_id": db_id, "question": question, "sql": sql}


def read_json_list('''


def test_a_new_data_format_is_a_function_in_questions(load, tmp_path):
    questions = load(
        "sql/questions.py",
        ("def read_json_list(", NEW_FORMAT),
        (
            '    if suffix in (".csv", ".tsv"):\n',
            '    if suffix == ".txt":\n        entries = _read_pairs(file)\n'
            '    elif suffix in (".csv", ".tsv"):\n',
        ),
    )
    file = tmp_path / "dev.txt"
    file.write_text("shop\nhow many ?\nSELECT 1\n\nshop\nwho ?\nSELECT 2\n")
    read = questions.read_conversations(file)
    found = [(talk.db_id, talk.questions[0].text, talk.questions[0].sql) for talk in read]
    assert found == [("shop", "how many ?", "SELECT 1"), ("shop", "who ?", "SELECT 2")]


KEY = """
import json
import train_sft
from mtsql.agent.prompts import PromptStyle
from mtsql.sql import datasets
from mtsql.toyworld.world import WorldConfig
from mtsql.warm_start import warm_start_key

datasets.WorldConfig = lambda: WorldConfig(2, 1, 4, 1, 1)
print(json.dumps({"key": warm_start_key(train_sft.Config(style="full"))}))
"""


@pytest.mark.slow
def test_a_new_prompt_is_a_sentence_in_prompts_and_makes_another_warm_start(tmp_path):
    edits = [("judge what comes back.", "judge what the database returns.")]
    plain = run_in_copy(tmp_path / "plain", "agent/prompts.py", [], KEY)
    again = run_in_copy(tmp_path / "again", "agent/prompts.py", [], KEY)
    new = run_in_copy(tmp_path / "new", "agent/prompts.py", edits, KEY)
    assert plain == again != new
