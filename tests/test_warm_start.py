"""The warm start of train_rl.py is made once and continued by the same command."""

import inspect
import itertools
import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import train_rl
import train_sft
from accelerate import Accelerator
from safetensors.torch import load_file

from helpers import runs
from helpers.runs import FLAGS, SMALL_RL, finish, stop_when
from mtsql import copying, warm_start
from mtsql.agent.env import EnvConfig
from mtsql.engine.engine import EngineConfig
from mtsql.files import WriteError, read_rows
from mtsql.learner.packing import Sample
from mtsql.model.policy import EmbeddedConfig, ModelConfig, resolved
from mtsql.run.checkpoint import CheckpointConfig
from mtsql.run.launch import NOTHING_LEARNED, run_script
from mtsql.run.signals import no_interrupt
from mtsql.sql.datasets import DataConfig

start = partial(runs.start, script=SMALL_RL)
LONG = ["--warm_start.max_samples", "64", "--warm_start.epochs", "6", "--num_updates", "1"]


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs/warm-start").glob("*"))


def num_steps_done(folder: Path) -> int:
    files = list((folder / "runs/warm-start").glob("*/metrics.jsonl"))
    return len(files[0].read_text().splitlines()) if files else 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [file] = (folder / "runs/warm-start").glob("*/model/model.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    finish(start(*FLAGS, *LONG, cwd=folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_same_command_continues_a_warm_start_and_leaves_nothing_behind(straight, tmp_path, sig):
    process = start(*FLAGS, *LONG, cwd=tmp_path)
    stop_when(process, lambda: num_steps_done(tmp_path) >= 5, sig)
    _, err = finish(process, -sig if sig == signal.SIGKILL else 128 + sig)
    if sig != signal.SIGKILL:
        last = err.strip().splitlines()[-1]
        assert last.endswith("optimizer steps; the same command continues it")
        assert not (tmp_path / "runs/rl").exists()
    [name] = parts(tmp_path)
    assert name.endswith(".partial")
    out, _ = finish(start(*FLAGS, *LONG, cwd=tmp_path))
    assert "continuing the one that was begun" in " ".join(out.split())  # lines are broken
    assert parts(tmp_path) == parts(straight)
    found, wanted = weights(tmp_path), weights(straight)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    out, _ = finish(start(*FLAGS, *LONG, "--run", "runs/again", cwd=tmp_path))
    assert "no warm start" not in " ".join(out.split())


def test_an_interrupted_warm_start_is_continued_bit_for_bit(tmp_path, monkeypatch, small_world):
    """It stops among the steps of whole texts, whose texts to copy from are random."""
    small = EmbeddedConfig(num_layers=1, hidden_size=32, intermediate_size=32)
    sft = train_sft.Config(
        model=ModelConfig(embedded=small),
        data=DataConfig(toy_folder=str(tmp_path / "world")),
        style="brief",
        sft=replace(train_sft.SftConfig(), epochs=1.0, max_samples=64, whole_text_frac=0.75),
        checkpoint=CheckpointConfig(every=0),
    )

    def make(name: str) -> dict[str, torch.Tensor]:
        accelerator = Accelerator(cpu=True)
        warm_start.make_warm_start(sft, tmp_path / name, accelerator, train_sft.warm_start)
        return load_file(tmp_path / name / "model/model.safetensors")

    calls = itertools.count()

    def stop_after_five():
        if next(calls) == 5:
            raise KeyboardInterrupt
        return no_interrupt()

    with monkeypatch.context() as patched:
        patched.setattr(train_sft, "no_interrupt", stop_after_five)
        try:
            with pytest.raises(
                KeyboardInterrupt, match="after 5 optimizer steps; the same command"
            ):
                make("stopped")
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert (tmp_path / "stopped.partial").is_dir() and not (tmp_path / "stopped").exists()
    straight, stopped = make("straight"), make("stopped")
    assert all(torch.equal(stopped[name], straight[name]) for name in straight)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("straight", "stopped")]
    assert [text.count("\n") for text in lines] == [8, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "straight", "world"]


def test_a_run_without_an_optimizer_step_says_so_and_has_its_own_exit_code(
    tmp_path, monkeypatch, capsys, small_world
):
    flags = [*FLAGS, "--warm_start", "null", "--num_updates", "1", "--reward.overlong_buffer", "0"]
    flags += ["--advantage.baseline", "mean", "--loss.kl_coef", "0"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [train_rl.__file__, *flags])
    with pytest.raises(SystemExit) as stop:
        run_script(train_rl.main, train_rl.Config, "", train_rl.PRESETS)
    assert stop.value.code == NOTHING_LEARNED
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("warning: no optimizer step was taken in 1 updates")
    lines = map(json.loads, (tmp_path / "runs/rl/metrics.jsonl").read_text().splitlines())
    assert [line["num_steps"] for line in lines if line["stage"] == "rl"] == [0]
    assert (tmp_path / "runs/rl/model/config.json").is_file()


def test_the_key_depends_on_the_settings_that_change_the_result_only(monkeypatch):
    monkeypatch.setattr(warm_start, "warm_start_texts", lambda *_: ["the same texts"])
    config = train_sft.Config(style="brief")
    key = warm_start.warm_start_key(config)
    for same in (
        replace(config, engine=EngineConfig(max_rows=3)),
        replace(config, run="elsewhere", resume="elsewhere"),
        replace(config, checkpoint=CheckpointConfig(every=1)),
        replace(config, env=replace(config.env, num_sql_workers=1)),
        replace(config, trackers=("wandb",)),
        replace(config, model=resolved(config.model)),
    ):
        assert warm_start.warm_start_key(same) == key
    for other in (
        replace(config, seed=1),
        replace(config, env=EnvConfig(max_replies=3)),
        replace(config, sft=replace(config.sft, epochs=2)),
        replace(config, style="full"),
    ):
        assert warm_start.warm_start_key(other) != key


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"config.yaml": "run: x\nmod", "metrics.jsonl": ""}, "config.yaml: .*could not find"),
        ({"metrics.jsonl": ""}, "config.yaml: cannot be read: No such file"),
        ({"config.yaml": "", "inputs.json": '{"files'}, "inputs.json: not JSON"),
    ],
)
def test_a_damaged_warm_start_is_named_with_advice(damage, words, tmp_path):
    partial = tmp_path / "seed0-key.partial"
    partial.mkdir()
    for name, text in damage.items():
        (partial / name).write_text(text)
    sft = train_sft.Config(style="brief")
    with pytest.raises(
        ValueError, match=f"{words}.* delete that folder to train it again"
    ) as error:
        warm_start.make_warm_start(
            sft, tmp_path / "seed0-key", Accelerator(cpu=True), train_sft.warm_start
        )
    assert str(partial) in str(error.value) and not (partial / ".lock").exists()


def test_a_warm_start_on_a_full_disk_says_how_to_continue(tmp_path, monkeypatch):
    def fail(*_):
        raise WriteError("model: cannot be written: No space left on device")

    monkeypatch.setattr(train_sft, "warm_start", fail)
    sft = train_sft.Config(style="brief")
    with pytest.raises(ValueError, match="on device; no step .* the same command starts it again$"):
        warm_start.make_warm_start(
            sft, tmp_path / "seed0-key", Accelerator(cpu=True), train_sft.warm_start
        )


def test_a_warm_start_is_the_same_whatever_the_machine_decodes_with(monkeypatch):
    """So another machine continues it. The run keeps its own value."""
    found = []
    monkeypatch.setattr(train_rl, "kept_warm_start", lambda sft, *_: found.append(sft) or "kept")
    for few_rows in (0, 64):
        config = train_rl.Config(model=ModelConfig(few_rows=few_rows))
        model = train_rl.warm_started(config, Accelerator(cpu=True)).model
        assert (model.path, model.few_rows) == ("kept", few_rows)
    assert found[0] == found[1]


def test_a_warm_start_is_known_by_the_share_of_whole_texts(tmp_path, small_world):
    config = train_sft.Config(data=DataConfig(toy_folder=str(tmp_path / "world")), style="brief")

    def key(frac: float | None) -> str:
        sft = train_sft.SftConfig(whole_text_frac=frac)
        return warm_start.warm_start_key(replace(config, sft=sft))

    assert key(None) == key(config.whole_text_frac) != key(0.0)


def test_a_warm_start_is_known_by_the_code_of_its_texts_to_copy(monkeypatch):
    def source(module: ModuleType) -> str:
        return f"other {module.__name__}" if module is copying else getsource(module)

    getsource = inspect.getsource
    monkeypatch.setattr(warm_start, "warm_start_texts", lambda *_: ["the same texts"])
    config = train_sft.Config(style="brief")
    key = warm_start.warm_start_key(config)
    assert warm_start.warm_start_key(config) == key
    monkeypatch.setattr(inspect, "getsource", source)
    assert warm_start.warm_start_key(config) != key


def test_each_step_of_whole_texts_has_other_texts_to_copy(tmp_path, monkeypatch, small_world):
    """The texts depend on the seed and the step only, so a resumed run draws the same ones."""
    small = EmbeddedConfig(num_layers=1, hidden_size=32, intermediate_size=32)
    drawn: list[list[Sample]] = []

    def record(*values):
        drawn.append(copying.copy_texts(*values))
        return drawn[-1]

    monkeypatch.setattr(train_sft, "copy_texts", record)
    for seed in (0, 1):
        train_sft.main(
            train_sft.Config(
                model=ModelConfig(embedded=small),
                data=DataConfig(toy_folder=str(tmp_path / "world")),
                style="brief",
                seed=seed,
                sft=train_sft.SftConfig(max_samples=32, epochs=1.0, whole_text_frac=0.75),
                run=str(tmp_path / f"run{seed}"),
            )
        )
    assert len(drawn) == 6  # three of four steps, twice
    assert all(first != second for first, second in itertools.combinations(drawn, 2))


def test_the_embedded_model_learns_whole_texts_first(tmp_path, small_world):
    """The first part of the steps has a loss on all tokens, and the others on the replies only. A
    model that was pretrained learns the replies alone."""
    small = EmbeddedConfig(num_layers=1, hidden_size=32, intermediate_size=32)
    data = DataConfig(toy_folder=str(tmp_path / "world"))
    sft = train_sft.SftConfig(max_samples=64, epochs=1.0)
    config = train_sft.Config(
        model=ModelConfig(embedded=small),
        data=data,
        style="brief",
        sft=sft,
        run=str(tmp_path / "a"),
    )
    train_sft.main(config)

    def tokens(run: str) -> list[int]:
        rows = read_rows(tmp_path / run / "metrics.jsonl")
        return [row["num_tokens"] for row in rows if "loss" in row]

    begun = tokens("a")
    assert len(begun) == 8
    model = ModelConfig(path=str(tmp_path / "a/model"))
    train_sft.main(replace(config, model=model, run=str(tmp_path / "b")))
    own = tokens("b")  # the same samples, without a loss on whole texts
    assert all(begun[i] > 2 * own[i] for i in range(3))  # 0.4 * 8 is rounded to 3 steps
    assert own[3:] == begun[3:]
    assert max(tokens("b")) < min(begun[:3])
