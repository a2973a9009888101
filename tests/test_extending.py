"""A new tool, reward, loss, advantage, curriculum, data format, architecture, prompt or preset is
an edit in one file. The tests make the edits of docs/change.md and docs/change_learning.md.

The copy of a single module is loaded beside the unchanged rest. Where other modules must see the
edit, a new process runs on a copy of the whole tree.
"""

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
import train_rl
from transformers import MistralConfig, MistralForCausalLM

from helpers.edits import ROOT, Edit, copied_tree, edited, result_in, run_in, sections, shown_edit
from helpers.episodes import GOLD, answer, call, make_env, play, singers
from helpers.models import SHAPE, with_exact_norms
from mtsql.learner.logprobs import token_logprobs
from mtsql.learner.packing import Sample, pack
from mtsql.model import decoder
from mtsql.run.config import parse_config

SECTIONS = {
    heading: text
    for page in ("change.md", "change_learning.md")
    for heading, text in sections(ROOT / "docs" / page).items()
}
EDITS = {heading: shown_edit(text) for heading, text in SECTIONS.items()}


def edit(word: str) -> tuple[str, list[Edit]]:
    """The file and the edits of the section whose heading has this word."""
    [found] = [shown for heading, shown in EDITS.items() if word in heading]
    return found


@pytest.fixture
def load(tmp_path, monkeypatch) -> Callable[..., ModuleType]:
    """Loads an edited copy of one module of the package."""

    def load(module: str, *edits: Edit) -> ModuleType:
        source = ROOT / "src" / "mtsql" / module.removeprefix("src/mtsql/")
        file = tmp_path / source.name
        file.write_text(edited(source.read_text(), *edits))
        spec = importlib.util.spec_from_file_location(f"edited_{file.stem}", file)
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, loaded)
        spec.loader.exec_module(loaded)
        return loaded

    return load


USE_NEW_TOOL = """
import json, pathlib, sys
from mtsql.agent.env import EnvConfig, SqlEnv
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
    found = result_in(copied_tree(tmp_path, *edit("tool")), USE_NEW_TOOL)
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
        (GROUP, GROUP + '"shortest": shortest,'),
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


def test_the_reward_of_the_page_pays_right_answers_by_their_length(load, tmp_path):
    file, edits = edit("reward")
    rewards = load(file, *edits)
    database = singers(tmp_path / "shows.sqlite")
    config = rewards.RewardConfig()
    found = []
    for sql in (GOLD, "SELECT age FROM singer"):
        trajectory = play(make_env(database), [call(sql), answer(sql)])
        trajectory.add_sampled([7] * 100, [-1.0] * 100)
        components = rewards.reward_components(trajectory, config)
        total = rewards.total_reward({"concise": components["concise"]}, config.weights)
        found.append((components["concise"], total))
    assert found == [(0.5, 0.1), (0.0, 0.0)]


def test_a_new_loss_is_a_branch_of_policy_loss(load):
    file, edits = edit("loss")
    losses = load(file, *edits)
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    batch = SimpleNamespace(
        old_logprobs=torch.tensor([-1.5, -2.0]), advantages=torch.tensor([0.5, -3.0])
    )
    config = losses.LossConfig(objective="reinforce", kl_coef=0.0)
    loss, stats = losses.policy_loss(logprobs, torch.zeros(2), batch, config)
    loss.backward()
    assert loss.item() == 0.5 - 6.0 and logprobs.grad.tolist() == [-0.5, 3.0]
    assert stats["logprob_gap"] == 0.5


def test_a_new_advantage_is_a_branch_of_centred(load):
    file, edits = edit("advantage")
    advantages = load(file, *edits)
    config = advantages.AdvantageConfig(baseline="median", scale="none")
    assert advantages.batch_advantages([[0.0, 1.0, 5.0]], config) == [[-1.0, 0.0, 4.0]]
    with pytest.raises(ValueError, match="a group of 1 cannot be compared"):
        advantages.batch_advantages([[1.0]], config)


def test_a_new_rule_of_the_curriculum_is_a_branch_of_build_curriculum(load):
    file, edits = edit("curriculum")
    curriculum = load(file, *edits)
    counts = {"a": (0, 4), "b": (1, 4), "c": (4, 4)}
    for drops, stages in ((False, [[], [], ["a", "b"]]), (True, [[], [], ["b"]])):
        config = curriculum.CurriculumConfig(drop_unsolved=drops)
        built = curriculum.build_curriculum(counts, config, seed=0)
        assert built.stages == stages and built.num_dropped == 1 + drops


def test_a_new_architecture_computes_what_transformers_computes(load, monkeypatch):
    file, edits = edit("architecture")
    architectures = load(file, *edits)
    torch.manual_seed(0)
    settings = MistralConfig(**SHAPE, sliding_window=None)
    theirs = with_exact_norms(MistralForCausalLM._from_config(settings, dtype=torch.float64))
    with pytest.raises(ValueError, match="model type 'mistral' is not supported"):
        decoder.from_transformers(theirs)
    for name in ("biases", "check_architecture"):
        monkeypatch.setattr(decoder, name, getattr(architectures, name))
    sample = Sample([3, 1, 4], [1, 5, 9, 2, 6], [1, 1, 1, 1, 1])
    [batch] = pack([sample], 100)
    found, _ = token_logprobs(decoder.from_transformers(theirs), batch, 1.0)
    logits = theirs(input_ids=torch.tensor([sample.prompt_ids + sample.ids])).logits[0]
    expected = logits[2:-1].log_softmax(-1)[torch.arange(5), torch.tensor(sample.ids)]
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="sliding-window"):
        architectures.check_architecture(MistralConfig(**SHAPE, sliding_window=8))


def test_a_new_preset_is_a_recipe_in_their_folder(tmp_path):
    (tmp_path / "mine.yaml").write_text("loss: {kl_coef: 0.5}\n")
    config = parse_config(train_rl.Config, ["--preset", "mine"], "", tmp_path)
    assert (config.preset, config.loss.kl_coef) == ("mine", 0.5)
    with pytest.raises(ValueError, match="preset is dapo: expected one of mine or null"):
        parse_config(train_rl.Config, ["--preset", "dapo"], "", tmp_path)


def test_a_new_data_format_is_a_function_in_questions(load, tmp_path):
    module, edits = edit("data format")
    questions = load(module, *edits)
    file = tmp_path / "dev.yaml"
    file.write_text(
        '- {db_id: shop, question: "how many ?", sql: SELECT 1}\n'
        '- {db_id: shop, question: "who ?", sql: SELECT 2}\n'
    )
    read = questions.read_conversations(file)
    found = [(talk.db_id, talk.questions[0].text, talk.questions[0].sql) for talk in read]
    assert found == [("shop", "how many ?", "SELECT 1"), ("shop", "who ?", "SELECT 2")]
    file.write_text('- {db_id: shop, question: "how many ?"}\n')
    with pytest.raises(ValueError, match="dev.yaml: entry 1: has the keys 'db_id'"):
        questions.read_conversations(file)


KEY = """
import json
import train_sft
from mtsql.sql import datasets
from mtsql.toyworld.world import WorldConfig
from mtsql.warm_start import warm_start_key

datasets.WorldConfig = lambda: WorldConfig(2, 1, 4, 1, 1)
print(json.dumps({"key": warm_start_key(train_sft.Config(style="full"))}))
"""


@pytest.mark.slow
def test_a_new_prompt_is_a_sentence_in_prompts_and_makes_another_warm_start(tmp_path):
    file, edits = edit("prompt")
    plain = result_in(copied_tree(tmp_path / "plain", file, []), KEY)
    again = result_in(copied_tree(tmp_path / "again", file, []), KEY)
    new = result_in(copied_tree(tmp_path / "new", file, edits), KEY)
    assert plain == again != new


def commands_of(text: str) -> list[list[str]]:
    """The `pytest ...` commands of a section, as words."""
    return [shlex.split(line) for line in re.findall(r"`(pytest [^`]+)`", text)]


@pytest.mark.parametrize("heading", EDITS)
def test_a_section_fits_the_source_and_names_its_tests(heading):
    file, edits = EDITS[heading]
    text = (ROOT / file).read_text()
    changed = edited(text, *edits)
    assert 0 < len(changed.splitlines()) - len(text.splitlines()) <= 15 or heading.endswith(
        "prompt?"
    )
    assert max(map(len, changed.splitlines())) <= 100
    [words] = commands_of(SECTIONS[heading])
    assert all((ROOT / word).is_file() for word in words[1:])


@pytest.mark.slow
@pytest.mark.parametrize("heading", EDITS)
def test_the_tests_that_a_section_names_pass_after_its_edit(heading, tmp_path):
    tree = copied_tree(tmp_path, *EDITS[heading])
    [words] = commands_of(SECTIONS[heading])
    assert "failed" not in run_in(tree, "-m", *words)


FLAGS = """
import json, sys
import train_rl
from mtsql.run.config import flat, parse_config, to_dict

print(json.dumps(flat(to_dict(parse_config(train_rl.Config, sys.argv[1:], "")))))
"""


@pytest.mark.slow
def test_all_edits_together_have_the_flags_that_the_pages_name(tmp_path):
    tree = copied_tree(tmp_path, *edit("tool"))
    words = []
    for heading, (file, edits) in EDITS.items():
        if "tool" not in heading:
            (tree / file).write_text(edited((tree / file).read_text(), *edits))
        text = SECTIONS[heading].replace("\n", " ")
        for flag, value in re.findall(r"`(--[a-z_.]+)(?: ([^`]+))?`", text):
            words += [flag, *shlex.split(value or "0.5")]
    (tree / "flags.py").write_text(FLAGS)
    values = json.loads(run_in(tree, "flags.py", *words).splitlines()[-1])
    assert len(words) == 10 and values["curriculum.drop_unsolved"] is True
    assert values["env.tools"] == ["exec_sql", "memory_retrieve", "list_tables"]
    assert values["loss.objective"] == "reinforce" and values["reward.weights.concise"] == 0.5
    assert values["advantage.baseline"] == "median"
