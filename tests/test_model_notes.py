"""The notes in a model folder (mtsql.json) are the defaults of eval.py and of the prompts."""

import json
from dataclasses import replace
from pathlib import Path

import eval as eval_script
import pytest
import train_rl
import train_sft

from helpers.models import EMBEDDED, tiny_tokenizer
from mtsql.agent.env import EnvConfig
from mtsql.engine.sampling import SamplingConfig
from mtsql.model.policy import (
    AdapterConfig,
    ModelConfig,
    build_embedded,
    load_policy,
    save_policy,
)
from mtsql.model_notes import differences, notes_of, prompt_style
from mtsql.run.config import flat, parse_config, to_dict
from mtsql.sql import datasets
from mtsql.sql.sandbox import QueryConfig
from mtsql.toyworld.world import WorldConfig

TRAINED = train_rl.Config(
    style="brief",
    env=EnvConfig(
        max_replies=7, tools=("exec_sql",), num_sql_workers=2, query=QueryConfig(max_rows=7)
    ),
    sampling=SamplingConfig(max_reply_tokens=24, max_trajectory_tokens=99),
    max_prompt_tokens=1234,
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A model folder as a run of `TRAINED` leaves it."""
    save_policy(
        build_embedded(tokenizer, EMBEDDED, seed=1),
        tokenizer,
        tmp_path / "model",
        notes=notes_of(TRAINED),
    )
    return tmp_path / "model"


def played(config):
    """The keys of a configuration that shape an episode, flat."""
    return flat(notes_of(config)["mtsql.json"])


def parsed(*argv):
    return parse_config(eval_script.Config, [str(word) for word in argv], "")


def test_eval_has_the_settings_of_the_training_as_defaults(folder):
    config = parsed("--model.path", folder)
    assert played(config) == played(TRAINED) and config.env.max_replies == 7
    assert config.sampling.temperature == 0 and config.env.num_sql_workers == 0  # not the model's
    assert differences(config) is None
    (folder / "own.gguf").touch()
    assert played(parsed("--model.path", folder / "own.gguf")) == played(TRAINED)


def test_a_recipe_wins_over_the_model_and_flags_over_both(folder, tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        f"model: {{path: {folder}}}\n"
        "env: {max_replies: 3, max_observation_rows: 5}\nstyle: full\n"
    )
    config = parsed("--config", recipe, "--env.max_replies", "2")
    changed = {"style": "full", "env.max_replies": 2, "env.max_observation_rows": 5}
    assert played(config) == {**played(TRAINED), **changed}
    assert differences(config) == (
        f"differs from the training of {folder}: "
        "style full (was brief), env.max_replies 2 (was 7), "
        "env.max_observation_rows 5 (was 10)"
    )
    line = differences(
        parsed("--model.path", folder, "--env.tools", "[]", "--env.num_sql_workers", "1")
    )
    assert line.endswith(': env.tools [] (was ["exec_sql"])')


def test_a_model_without_notes_has_the_defaults_of_the_script(tokenizer, tmp_path):
    save_policy(build_embedded(tokenizer, EMBEDDED, seed=1), tokenizer, tmp_path / "model")
    assert not (tmp_path / "model/mtsql.json").exists()
    config = parsed("--model.path", tmp_path / "model")
    assert config == replace(eval_script.Config(), model=ModelConfig(path=str(tmp_path / "model")))
    assert differences(config) is None and parsed("--model.path", "nowhere").env == EnvConfig()


def test_a_key_that_the_file_does_not_have_keeps_its_default(folder):
    (folder / "mtsql.json").write_text('{"env": {"query": {"timeout_secs": 5}, "max_replies": 1}}')
    config = parsed("--model.path", folder, "--sampling.max_reply_tokens", "9")
    assert config.env == EnvConfig(max_replies=1, query=QueryConfig(timeout_secs=5))
    assert config.style is None and differences(replace(config, style="full")) is None


def test_a_byte_order_mark_is_skipped(folder):
    (folder / "mtsql.json").write_text('{"env": {"max_replies": 1}}', encoding="utf-8-sig")
    assert parsed("--model.path", folder).env.max_replies == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("\xff", "not UTF-8"),
        ("[" * 100_000, "nested too deeply"),
        ('{"max_prompt_tokens": NaN}', "NaN is not a JSON number"),
        ("[1]", "expected a JSON object, found [1]"),
        ('{"run": "x"}', "unknown key run"),
        ('{"env": {"nope": 1}}', "unknown key env.nope"),
        ('{"env": {"max_steps": 4}}', "another version of mtsql"),
        ('{"sampling": {"temperature": 1}}', "unknown key sampling.temperature"),
        ('{"env": 3}', "env is 3, but it has keys of its own"),
        ('{"env": {"max_replies": "many"}}', "env.max_replies is "),
        ('{"env": {"max_replies": true}}', "env.max_replies is "),
        ('{"env": {"max_replies": null}}', "env.max_replies is null"),
        ('{"env": {"max_replies": 0}}', "env.max_replies must be at least 1"),
        ('{"env": {"query": {"max_rows": 0}}}', "max_rows: expected a positive"),
        ('{"env": {"num_sql_workers": 2}}', "env.num_sql_workers is no key"),
        ('{"env.max_replies": null}', "env.max_replies is null"),
        ('{"env": "nowhere"}', "env is nowhere: it has keys"),
        ('{"env": "steps.yaml"}', "env is no key"),
        (
            '{"style": "BRIEF"}',
            "style is BRIEF: expected one of full, brief; if another version of mtsql wrote",
        ),
        ('{"style": null}', "style is null"),
        ('{"max_prompt_tokens": [4000]}', "max_prompt_tokens is [4000]: expected a whole number"),
    ],
)
def test_a_faulty_file_is_a_one_line_error(folder, text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steps.yaml").write_text("max_replies: 2")
    (folder / "mtsql.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError) as error:
        parsed("--model.path", folder)
    message = str(error.value)
    assert (
        message.startswith(f"{folder / 'mtsql.json'}: ")
        and words in message
        and "\n" not in message
    )


def test_all_scripts_choose_the_prompt_style_by_one_rule(folder):
    path = str(folder)
    assert prompt_style(None, path) == "brief"
    assert prompt_style("full", path) == "full"
    (folder / "mtsql.json").unlink()
    assert prompt_style(None, path) == "full"
    assert prompt_style(None, None) == "brief"


def test_the_notes_are_renamed_into_place_together_with_the_weights(folder, tokenizer):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(TypeError):
        save_policy(
            build_embedded(tokenizer, EMBEDDED, seed=2),
            tokenizer,
            folder,
            notes={"mtsql.json": {"env": 1j}},
        )
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_adapter_folder_has_notes(folder, tokenizer, tmp_path):
    policy = load_policy(ModelConfig(path=str(folder), lora=AdapterConfig(rank=2)))
    save_policy(
        policy,
        tokenizer,
        tmp_path / "adapters",
        notes=notes_of(replace(TRAINED, max_prompt_tokens=7)),
    )
    assert (tmp_path / "adapters/adapter_config.json").is_file()
    config = parsed("--model.path", tmp_path / "adapters")
    assert config.max_prompt_tokens == 7 and config.style == "brief"
    load_policy(config.model)  # nobody stumbles over the file


def test_further_training_keeps_the_style_and_sets_its_own_budgets(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        datasets, "WorldConfig", lambda: WorldConfig(num_train_databases=3, num_dev_databases=1)
    )
    sft = train_sft.SftConfig(epochs=1, max_samples=2, samples_per_update=2)
    config = train_sft.Config(model=ModelConfig(path=str(folder)), sft=sft)
    train_sft.main(config.completed())
    text = " ".join(capsys.readouterr().out.split())  # a long line is broken between words
    assert text.count("differs from") == 1 and "style" not in text
    assert "env.max_replies 6 (was 7)" in text and "sampling.max_reply_tokens 512 (was 24)" in text
    saved = json.loads(Path("runs/sft/model/mtsql.json").read_text())
    assert saved == notes_of(replace(config, style="brief"))["mtsql.json"]
    assert "style: brief" in Path("runs/sft/config.yaml").read_text().splitlines()
    checkpoint = to_dict(parsed("--model.path", "runs/sft/model"))
    assert checkpoint["sampling"]["max_reply_tokens"] == 512 and checkpoint["style"] == "brief"
