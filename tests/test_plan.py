"""mtsql plan: what it reads from a recipe, what it counts, what it refuses and proposes."""

import json
import math
from dataclasses import replace

import pytest

from helpers.pages import ROOT
from mtsql.__main__ import main
from mtsql.commands.plan import split_words
from mtsql.model.policy import ModelConfig, policy_shape
from mtsql.model.shapes import SHAPES, shape_named
from mtsql.plan.clock import BANDWIDTHS, Clock, Lengths, Shares, gpu_named
from mtsql.plan.fit import Way, fits, memory_of, peak, proposals
from mtsql.plan.recipe import read_recipe, stage_of, with_flags

RL = str(ROOT / "configs/rl_cosql_qwen3_4b.yaml")
SFT = str(ROOT / "configs/sft_sparc_qwen3_1.7b.yaml")
EVAL = str(ROOT / "configs/eval_cosql_qwen3_4b_budget_2000.yaml")
GIB = 1 << 30


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working directory without the models and data that a user of this checkout may have."""
    monkeypatch.chdir(tmp_path)


def clock(**keys):
    """The clock of Qwen3-1.7B on one H100, unless `keys` say otherwise."""
    usual = {
        "shape": SHAPES["qwen3-1.7b"],
        "gpu": gpu_named("H100"),
        "lengths": Lengths(),
        "shares": Shares(),
        "num_ranks": 1,
        "is_sharded": False,
        "is_adapted": False,
        "checkpointing": True,
        "cache_bytes": 16 * GIB,
        "max_rows": 256,
        "max_tokens": 8000,
    }
    return Clock(**{**usual, **keys})


def planned(capsys, *words):
    """What the command prints, and its error, if it ends with one."""
    error = None
    try:
        main(["plan", *words])
    except SystemExit as stop:
        error = str(stop.code)
    return capsys.readouterr().out, error


def test_the_help_names_every_gpu(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(sorted(BANDWIDTHS)[:-1])} or {max(BANDWIDTHS)}" in out


def test_the_4b_recipe_fits_eight_gpus_sharded_and_the_hours_are_shown(capsys):
    out, error = planned(capsys, RL, "--gpus", "8")
    assert error is None
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["fits"][1:] == ["no", "(learning)", "yes"]
    assert "hours on 8 x H100 of 80 GiB, FSDP2" in out and "DDP\n" not in out
    phases = [float(rows[name][1]) for name in ("probe", "rollouts", "learning", "evaluation")]
    assert float(rows["all"][1]) == pytest.approx(sum(phases), abs=0.21)
    assert "lengths.sampled_tokens 1800" in out


def test_a_run_that_cannot_fit_is_refused_with_what_would(capsys):
    out, error = planned(capsys, RL)
    assert "no (learning)" in out and "hours" not in out
    assert error.startswith(f"error: {RL} does not fit on 1 x H100 of 80 GiB: try --")
    assert "--optim.offload true (one GPU)" in error and "--gpus 2 (FSDP2)" in error
    recipe = read_recipe(RL, ["--optim.offload", "true"], None, 0, 0)
    assert fits(memory_of(recipe, Way("one GPU", 1, False)), 80 * GIB)
    _, error = planned(capsys, RL, "--gpu_memory", "4")
    assert error.endswith("try a larger GPU or a smaller model")


def test_each_proposal_fits_and_none_contains_another():
    recipe = read_recipe(RL, [], None, 0, 0)
    found = proposals(recipe, 1, 48 * GIB, most=99)
    ours = [text.removesuffix(" (one GPU)") for text in found if "one GPU" in text]
    assert ours
    for text in ours:
        values = {}
        for flag in text.removeprefix("--").split(" --"):
            key, value = flag.split()
            number = int(value.removesuffix("GiB")) if value[0].isdigit() else value
            values[key] = number * GIB if "GiB" in value else {"true": True}.get(value, number)
        changed = with_flags(recipe, values)
        assert fits(memory_of(changed, Way("one GPU", 1, False)), 48 * GIB)
    assert not [1 for a in ours for b in ours if a != b and set(a.split()) <= set(b.split())]


def test_a_reference_in_host_memory_is_on_the_gpu_only_while_it_scores():
    way = Way("one GPU", 1, False)
    recipe = read_recipe(RL, [], None, 0, 0)
    device = memory_of(recipe, way)
    host = memory_of(with_flags(recipe, {"reference": "host"}), way)
    assert (device["reference"], device["moved_reference"]) == (host["moved_reference"], 0)
    assert host["reference"] == 0
    assert peak(device)[1] - peak(host)[1] == device["reference"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "mtsql plan takes one recipe"),
        ([SFT, RL], "mtsql plan takes one recipe"),
        (["nowhere.yaml"], "recipe nowhere.yaml: no such file"),
        ([EVAL], "it is for neither train_sft.py nor train_rl.py"),
        ([SFT, "--gpu", "T4"], "gpu is T4: expected one of A100"),
        ([SFT, "--gpus", "0"], "gpus is 0: it must be at least 1"),
        ([SFT, "--gpu_memory", "0"], "gpu_memory is 0.0: it must be above 0"),
        ([SFT, "--shape", "gpt"], "shape is gpt: expected one of qwen3-0.6b"),
        ([SFT, "--turns", "-1"], "turns must not be negative"),
        ([SFT, "--solved", "[1.0]"], "solved must be shares"),
        ([SFT, "--optim.lr", "1"], "unknown flag --optim.lr (did you mean --sft.optim.lr?)"),
        ([SFT, "--model.path", "models/mine"], "give --shape, one of qwen3-0.6b"),
        ([SFT, "--data.train", "mine.json"], "give --turns and --dev_turns"),
    ],
)
def test_mistakes_end_in_one_line(words, complaint, capsys):
    _, error = planned(capsys, *words)
    assert error is not None and complaint in error and "\n" not in error


def test_what_offloading_costs_is_said_to_be_missing(capsys):
    flags = ["--gpus", "2", "--optim.offload", "true", "--reference", "host"]
    out, error = planned(capsys, RL, *flags)
    text = " ".join(out.split())
    assert error is None and "Adam's steps on the host" in text and "moving the reference" in text


def test_flags_of_the_script_win_over_the_recipe(capsys):
    words = [SFT, "--gpus", "2", "--sft.epochs", "1", "--model.lora.rank=8", "--lengths.spread=0.1"]
    recipes, own, others = split_words(words)
    assert recipes == [SFT]
    assert own == ["--gpus", "2", "--lengths.spread=0.1"]
    assert others == ["--sft.epochs", "1", "--model.lora.rank=8"]
    out, error = planned(capsys, *words)
    assert error is None and "trajectories x 1," in out


def test_sizes_come_from_the_folder_or_from_its_name(tmp_path):
    assert shape_named("models/Qwen3-1.7B-Base") == "qwen3-1.7b"
    assert shape_named("models/Llama_3.2_3B") == "llama-3.2-3b"
    assert shape_named("models/smollm2") is None
    folder = tmp_path / "anything"
    folder.mkdir()
    SHAPES["qwen3-0.6b"].save_pretrained(folder)
    recipe = read_recipe(SFT, ["--model.path", str(folder)], None, 0, 0)
    assert recipe.model == str(folder) and recipe.shape.hidden_size == 1024
    assert policy_shape(ModelConfig(path=str(folder))).num_hidden_layers == 28
    # Stage 2 starts from the result of stage 1, whose recipe names the model.
    assert read_recipe(RL, [], None, 0, 0).model == "qwen3-4b (published sizes)"


def test_turns_are_counted_in_the_files(tmp_path):
    train, dev = tmp_path / "train.json", tmp_path / "dev.json"
    goal = {"utterance": "all in all?", "query": "SELECT 1"}
    dialogues = [{"interaction": [{}, {}], "final": goal}, {"interaction": [{}]}]
    train.write_text(json.dumps(dialogues))
    dev.write_text(json.dumps([{"question": "how many?"}]))
    flags = ["--data.train", str(train), "--data.dev", str(dev)]
    recipe = read_recipe(SFT, flags, None, 0, 0)
    assert (recipe.turns, recipe.dev_turns, recipe.counted) == (4, 1, "the files")
    assert recipe.held_out_turns == 0 and recipe.evaluated == 1  # one database, which is trained on
    for place, dialogue in enumerate(dialogues):
        dialogue["database_id"] = f"db{place}"
    train.write_text(json.dumps(dialogues))
    halved = read_recipe(RL, [*flags, "--data.hold_out", "1"], None, 0, 0)
    assert {halved.turns, halved.held_out_turns} == {1, 3}
    assert halved.evaluated == halved.held_out_turns
    assert read_recipe(SFT, [*flags, "--data.goals", "false"], None, 0, 0).turns == 3
    assert read_recipe(SFT, flags, None, 50, 0).turns == 50
    assert stage_of(SFT) == "sft" and stage_of(str(ROOT / "configs/rl_no_exec.yaml")) == "rl"


def test_a_rollout_takes_as_long_as_its_steps():
    """All trajectories of the same length, which is the budget's."""
    lengths = Lengths(prompt_tokens=100, sampled_tokens=5000, observation_tokens=0, spread=0.0)
    shares = Shares(eager_layer_us=0.0, wait_secs=0.0, host_row_us=0.0, layer_us=1e6)
    same = replace(clock(), lengths=lengths, shares=shares, max_tokens=50, max_rows=4)
    layers = same.shape.num_hidden_layers
    prefill = same.rollout_secs(1, 4) - 50 * layers
    assert 0 < prefill < 1
    assert same.rollout_secs(2, 4) == pytest.approx(100 * layers, abs=1)  # two waves of 4 rows
    assert replace(same, num_ranks=2).rollout_secs(2, 4) == pytest.approx(50 * layers, abs=1)
    assert same.rollout_secs(0, 4) == 0


def test_rows_that_decode_together_are_bounded_by_the_cache():
    assert clock().num_rows(5) == 120  # 1,240 tokens of 114,688 bytes each
    assert clock(cache_bytes=64 * GIB).num_rows(5) == 256
    small = clock(cache_bytes=2 * GIB)
    assert 1 <= small.num_rows(5) <= 17
    assert small.rollout_secs(64, 5) > clock().rollout_secs(64, 5)


def test_a_short_episode_has_one_reply_and_a_budget_cuts_trajectories():
    short = Lengths().of_episodes(1, False)
    assert (short.sampled_tokens, short.observation_tokens, short.replies) == (600, 0, 1)
    assert Lengths().of_episodes(6, False) == Lengths()
    assert Lengths().of_episodes(4, True).sampled_tokens == Lengths().demonstration_tokens
    assert clock().sampled == pytest.approx(1800, rel=0.03)
    assert clock(max_tokens=1400).sampled < 1000
    assert clock(max_tokens=1400).learn_secs(8, 5) < 0.75 * clock().learn_secs(8, 5)


def test_no_hours_are_given_for_float32(capsys):
    out, error = planned(capsys, RL, "--gpus", "8", "--model.dtype", "float32")
    assert error is None and "known for bfloat16 only" in out and "TFLOP" not in out


def test_learning_takes_its_operations():
    one = clock(checkpointing=False)
    secs = one.learn_secs(8, 5)
    assert one.learn_secs(16, 5) == pytest.approx(2 * secs)
    assert clock(checkpointing=True).learn_secs(8, 5) == pytest.approx(secs * 4 / 3, rel=0.01)
    assert clock(checkpointing=False, num_ranks=8).learn_secs(8, 5) == pytest.approx(secs / 8)
    assert one.sync_secs() == 0 and clock(num_ranks=8).sync_secs() > 0
    assert clock(num_ranks=8, is_adapted=True).sync_secs() == 0
    assert not math.isclose(clock(is_adapted=True).learn_secs(8, 5), clock().learn_secs(8, 5))


@pytest.mark.parametrize(("hold_out", "count"), [(None, 467), ("0", 0), ("0.1", 934), ("14", 934)])
def test_held_out_turns_are_estimated_where_the_data_are_not_there(hold_out, count):
    flags = ["--data.hold_out", hold_out] if hold_out else []
    recipe = read_recipe(RL, flags, None, 0, 0)
    assert (recipe.turns, recipe.held_out_turns) == (9337 - count, count)
