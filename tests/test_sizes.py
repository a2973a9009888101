"""Sizes that do not fit together are found at the start, in a line that names the key."""

import json
import mmap
from dataclasses import replace
from pathlib import Path

import eval as eval_script
import pytest
import torch
import train_rl
import train_sft

from helpers.models import EMBEDDED, tiny_tokenizer
from mtsql.engine.config import check_engine
from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig
from mtsql.learner.logprobs import PolicyModule, score
from mtsql.learner.packing import Sample
from mtsql.model.policy import (
    ModelConfig,
    build_embedded,
    load_policy,
    load_tokenizer,
    policy_shape,
    save_policy,
)
from mtsql.model.sizes import BUDGETS, max_positions, require_embeddings, require_positions
from mtsql.rl.checks import check_config
from mtsql.sql.datasets import DataConfig
from mtsql.workbench import set_up

SIZE = replace(EMBEDDED, max_positions=64)
TOKEN_BYTES = 2 * 2 * 1 * 8 * 4  # keys and values, layers, heads, head_dim, float32


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def folder(tokenizer, tmp_path) -> str:
    save_policy(build_embedded(tokenizer, SIZE, seed=1), tokenizer, tmp_path / "model")
    return str(tmp_path / "model")


def change(folder: str, **keys) -> None:
    file = Path(folder) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


class Short:
    """A tokenizer as long as the embedding, before `longer` tokens were added."""

    def __init__(self, tokenizer, longer: int):
        self.length = len(tokenizer) - longer
        self.eos_token_id = tokenizer.eos_token_id
        self.pad_token_id = tokenizer.pad_token_id

    def __len__(self):
        return self.length


@pytest.mark.parametrize("longer", [20, 1, 0, -1, -20])
def test_a_tokenizer_longer_than_the_embedding_is_refused(longer, tokenizer, tmp_path):
    policy = build_embedded(Short(tokenizer, longer), SIZE, seed=1)
    save_policy(policy, tokenizer, tmp_path / "model")
    path = str(tmp_path / "model")
    rows = len(tokenizer) - longer
    shape = policy_shape(ModelConfig(path=path))
    loaded = load_tokenizer(path)
    if longer <= 0:
        return require_embeddings(shape, loaded, path)
    words = f"model.path {path}: the tokenizer gives .* but the model has only {rows} embeddings"
    with pytest.raises(ValueError, match=words):
        require_embeddings(shape, loaded, path)
    engine = Engine(
        load_policy(ModelConfig(path=path)).eval(),
        (),
        SamplingConfig(max_trajectory_tokens=9),
        EngineConfig(cache_bytes=1 << 16),
    )
    with pytest.raises(ValueError, match=f"token id {rows} is not among"):
        engine.open_group([1, rows], [(0, 0, 0, 0)])


@pytest.mark.parametrize(
    ("rope", "stated", "positions"),
    [
        ({"rope_type": "default"}, 64, 64),
        ({"rope_type": "linear", "factor": 4.0}, 64, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 40, 128),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 256, 256),
    ],
)
def test_the_positions_of_a_model_are_read_from_its_configuration(rope, stated, positions, folder):
    change(folder, max_position_embeddings=stated, rope_parameters={**rope, "rope_theta": 1e4})
    assert max_positions(policy_shape(ModelConfig(path=folder))) == positions


def test_more_tokens_than_positions_are_refused(folder):
    loaded = policy_shape(ModelConfig(path=folder))
    for shape, key in ((loaded, "max_position_embeddings"), (SIZE, "model.embedded.max_positions")):
        require_positions(shape, 64)
        with pytest.raises(ValueError) as error:
            require_positions(shape, 65)
        words = f"{BUDGETS}: 65 tokens, but the model has only 64 positions ({key}), 1 too few"
        assert str(error.value).startswith(words)


def test_a_sample_longer_than_the_positions_is_not_scored(folder):
    module = PolicyModule(load_policy(ModelConfig(path=folder)))
    for length, fits in ((63, True), (64, False), (700, False)):
        sample = Sample([30] * length, [31], [1])
        if fits:
            assert score(module, [sample], 1000, torch.device("cpu"))[0][0] < 0
            continue
        with pytest.raises(ValueError, match=f"a sample of {length + 1} tokens.* 64 positions"):
            score(module, [sample], 1000, torch.device("cpu"))


def test_set_up_checks_before_it_loads(folder, monkeypatch):
    """Neither data nor weights are touched: the data is not even there."""
    data = DataConfig(train="nowhere", dev="nowhere", tables="nowhere", databases="nowhere")
    env = train_rl.Config().env
    change(folder, max_position_embeddings=99)
    with pytest.raises(ValueError, match="100 tokens, but the model has only 99 positions"):
        set_up(ModelConfig(path=folder), data, env, "brief", ("train",), 0, 100)
    with pytest.raises(ValueError, match="model.embedded.max_positions"):
        set_up(ModelConfig(embedded=SIZE), data, env, "brief", ("train",), 0, 100)


def test_the_defaults_of_the_scripts_fit():
    rl, sft, scoring = train_rl.Config(), train_sft.Config(), eval_script.Config()
    check_config(rl)
    train_sft.check(sft)
    train_sft.check(replace(sft, source="self"))
    for config in (rl, sft, scoring):
        longest = config.max_prompt_tokens + config.sampling.max_trajectory_tokens
        require_positions(config.model.embedded, longest)
        check_engine(config.engine, config.model.embedded, longest, torch.float32)


@pytest.mark.parametrize(
    ("check", "config", "words"),
    [
        (check_config, train_rl.Config(max_batch_tokens=1000), "max_batch_tokens is 1000"),
        (check_config, train_rl.Config(max_batch_tokens=4639), "may have 4640 tokens"),
        (
            check_config,
            train_rl.Config(warm_start=train_sft.SftConfig(max_batch_tokens=4000)),
            "warm_start.max_batch_tokens is 4000",
        ),
        (
            train_sft.check,
            train_sft.Config(sft=train_sft.SftConfig(max_batch_tokens=4000)),
            "sft.max_batch_tokens is 4000",
        ),
        (
            train_sft.check,
            train_sft.Config(source="self", sft=train_sft.SftConfig(max_batch_tokens=8095)),
            "sft.max_batch_tokens is 8095, but one sample may have 8096 tokens",
        ),
    ],
)
def test_a_batch_too_small_for_the_longest_sample_is_refused(check, config, words):
    with pytest.raises(ValueError, match=words):
        check(config)


def test_a_batch_just_large_enough_is_accepted():
    check_config(train_rl.Config(max_batch_tokens=4640))
    train_sft.check(train_sft.Config(source="self", sft=train_sft.SftConfig(max_batch_tokens=8096)))


@pytest.mark.parametrize("prompt", range(1, 14))
def test_the_engine_accepts_the_sizes_that_check_engine_accepts(prompt, folder):
    """In the smallest cache that passes, a prompt and trajectory of that length find room."""
    model = load_policy(ModelConfig(path=folder)).eval()
    sampling, size = SamplingConfig(max_reply_tokens=5, max_trajectory_tokens=5), 4
    blocks = -(-(prompt + 5) // size) + 1
    limits = EngineConfig(block_size=size, cache_bytes=blocks * size * TOKEN_BYTES)
    for shape in (model.config, SIZE):
        check_engine(limits, shape, prompt + 5, torch.float32)
        short = replace(limits, cache_bytes=limits.cache_bytes - 1)
        with pytest.raises(
            ValueError, match=f"engine.cache_bytes is .* needs {limits.cache_bytes} bytes"
        ):
            check_engine(short, shape, prompt + 5, torch.float32)
        check_engine(
            replace(limits, cache_bytes=limits.cache_bytes // 2), shape, prompt + 5, torch.bfloat16
        )
    engine = Engine(model, (), sampling, limits)
    engine.open_group(list(range(1, prompt + 1)), [(0, 0, 0, 0)])
    done = []
    while not done:
        done = engine.step()
    assert len(done[0].ids) == 5


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_rows": 0}, "engine.max_rows is 0"),
        ({"max_rows": 10**9, "max_scheduled_tokens": 10**9}, "engine.max_rows is 1000000000"),
        ({"block_size": 0}, "engine.block_size is 0"),
        ({"cache_bytes": 0}, "engine.cache_bytes is 0"),
        ({"cache_bytes": -5}, "engine.cache_bytes is -5"),
        (
            {"max_scheduled_tokens": 5},
            "engine.max_scheduled_tokens is 5, less than engine.max_rows 64",
        ),
    ],
)
def test_limits_name_their_keys(limits, words):
    with pytest.raises(ValueError, match=words):
        EngineConfig(**limits)


@pytest.mark.parametrize("limits", [{"cache_bytes": 1000}, {"block_size": 10**9}])
def test_a_cache_smaller_than_a_block_is_refused(limits, folder):
    model = load_policy(ModelConfig(path=folder)).eval()
    with pytest.raises(
        ValueError, match="engine.cache_bytes is .* less than a block of engine.block_size"
    ):
        Engine(model, (), SamplingConfig(), EngineConfig(**limits))


@pytest.mark.parametrize(
    "error", [OSError(12, "Cannot allocate memory"), MemoryError(), OverflowError("too large")]
)
def test_a_cache_that_finds_no_memory_is_named(error, folder, monkeypatch):
    def refuse(*_):
        raise error

    monkeypatch.setattr(mmap, "mmap", refuse)
    model = load_policy(ModelConfig(path=folder)).eval()
    with pytest.raises(ValueError, match="no memory for engine.cache_bytes 1048576") as caught:
        Engine(model, (), SamplingConfig(), EngineConfig(cache_bytes=1 << 20))
    assert "\n" not in str(caught.value)


def test_more_cache_than_any_machine_has_is_refused(folder):
    model = load_policy(ModelConfig(path=folder)).eval()
    with pytest.raises(ValueError, match="no memory for engine.cache_bytes"):
        Engine(model, (), SamplingConfig(), EngineConfig(cache_bytes=10**30, block_size=10**25))
