"""mtsql measure: what it prints, and how it decides."""

import re

import pytest
import torch
import yaml

from helpers.models import save_embedded
from mtsql.__main__ import main
from mtsql.commands import measure
from mtsql.commands.measure import Config, Speed, decode_secs, faster, most_few_rows
from mtsql.engine.config import block_bytes
from mtsql.model.decoder import Linear
from mtsql.model.policy import ModelConfig, load_policy
from mtsql.run.config import parse_values


def test_it_prints_keys_of_a_recipe_below_what_was_measured(tmp_path, capsys):
    folder = save_embedded(tmp_path / "model")
    main(["measure", f"--model.path={folder}", "--rows=3", "--learn_tokens=40"])
    text = capsys.readouterr().out
    for dtype in ("float32", "bfloat16"):
        found = re.search(rf"^# {dtype}: a decode step of 3 rows (\S+) ms, .* (\S+) s$", text, re.M)
        assert found and all(float(number) >= 0 for number in found.groups())
    recipe = yaml.safe_load(text)
    config = parse_values(ModelConfig, recipe["model"], "printed")
    assert config.dtype in ("float32", "bfloat16") and config.few_rows >= 0


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--rows=0", "rows is 0: it must be at least 1"),
        ("--learn_tokens=3", "learn_tokens is 3: it must be at least 4"),
        ("--rows=2", "model.path is not set: name the model folder to measure"),
    ],
)
def test_a_wrong_flag_ends_it_with_one_line(flag, complaint):
    with pytest.raises(SystemExit) as stop:
        main(["measure", flag])
    assert complaint in str(stop.value.code)


def test_bfloat16_has_to_gain_in_generation_and_learning_together():
    wide = Speed(step_secs=1.0, learn_secs=8.0)
    halves = {0.5: "bfloat16", 0.8: "bfloat16", 0.99: "float32", 1.5: "float32"}
    for secs, best in halves.items():
        assert faster({"float32": wide, "bfloat16": Speed(secs, 8 * secs)}) == best
    slow_steps = {"float32": wide, "bfloat16": Speed(1.3, 4.0)}
    assert faster(slow_steps) == "bfloat16"


@pytest.mark.parametrize(("faster_until", "most"), [(64, 64), (8, 8), (1, 0)])
def test_few_rows_are_turned_as_far_as_each_number_before_gains(
    monkeypatch, tmp_path, faster_until, most
):
    """With a stopwatch that makes turning pay up to a number of rows."""
    model = load_policy(ModelConfig(path=str(save_embedded(tmp_path / "model"))))
    rows_seen = []
    compute = measure._compute

    def watched(layers, inputs):
        rows_seen.append(len(next(iter(inputs.values()))))
        compute(layers, inputs)

    def secs(run, device):
        run()
        few_rows = next(m.few_rows for m in model.modules() if isinstance(m, Linear))
        return 1.0 if not few_rows else 0.5 if rows_seen[-1] <= faster_until else 2.0

    monkeypatch.setattr(measure, "_compute", watched)
    monkeypatch.setattr(measure, "_median_secs", secs)
    with torch.no_grad():
        assert most_few_rows(model) == most
    assert max(rows_seen) == (64 if most == 64 else max(2, 2 * most))


@pytest.mark.parametrize("rows", [1, 70])
def test_all_rows_decode_while_a_step_is_measured(rows, tmp_path):
    model = load_policy(ModelConfig(path=str(save_embedded(tmp_path / "model")))).eval()
    num_bytes = 40 * block_bytes(model.config, 32, torch.float32)
    assert decode_secs(model, Config(rows=rows)) > 0
    if rows == 70:
        with pytest.raises(ValueError, match=f"cache_bytes is {num_bytes}: 70 rows"):
            decode_secs(model, Config(rows=rows, cache_bytes=num_bytes))
