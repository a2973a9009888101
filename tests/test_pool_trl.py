"""TRL reads a pool. Skipped without them:

pip install trl pytest; python -m pytest tests/test_pool_trl.py
"""

import os
import re
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from helpers.episodes import make_env, singers
from helpers.models import SHAPE, tiny_tokenizer
from helpers.pools import trajectory_of
from mtsql.model.rendering import Renderer
from mtsql.rl.pool import pool_record, write_pool

pytestmark = pytest.mark.skipif(
    find_spec("trl") is None or find_spec("datasets") is None, reason="TRL is not installed"
)
QWEN3 = os.environ.get("MTSQL_QWEN3_TOKENIZER")
"""A folder with Qwen3's own tokenizer, for the test that needs it."""


def pool_of(folder, tokenizer):
    """The file of a pool with one record, the record, and a training template for it."""
    renderer = Renderer(tokenizer)
    database = singers(folder / "singers.sqlite")
    env = make_env(database, style="full", history=(("who ?", "SELECT 1"),))
    record = pool_record(trajectory_of(env, renderer), renderer, 0)
    write_pool(folder / "pool.jsonl", [record])
    return folder / "pool.jsonl", record, renderer.training_template(*env.reset())


def by_trl(file: Path, tokenizer, folder: Path, template: str | None, dataset=None):
    """The first sample as SFTTrainer prepares it: (ids, labels)."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    named = {}
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
        named = {"chat_template_path": str(folder / "chat_template.jinja")}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"vocab_size": len(tokenizer)}))
    trainer = SFTTrainer(
        model,
        SFTConfig(
            str(folder / "out"),
            assistant_only_loss=dataset is None,
            max_length=None,
            report_to=[],
            use_cpu=True,
            bf16=False,
            **named,
        ),
        train_dataset=dataset or load_dataset("json", data_files=str(file), split="train"),
        processing_class=tokenizer,
    )
    [row] = trainer.train_dataset
    return row["input_ids"], row["labels"]


def test_the_code_of_the_page_gives_our_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/self/rounds/round0")
    folder.mkdir(parents=True)
    _, record, template = pool_of(folder, tiny_tokenizer())
    (folder / "chat_template.jinja").write_text(template)
    usual = import_module("trl").SFTConfig
    monkeypatch.setattr("trl.SFTConfig", partial(usual, use_cpu=True, bf16=False))
    names = {}
    page = Path(__file__).parents[1] / "docs" / "pool.md"
    for block in re.findall("```python\n(.*?)```", page.read_text(), flags=re.S):
        exec(compile(block, "pool.md", "exec"), names)
    ids, labels = by_trl(None, tiny_tokenizer(), tmp_path, None, names["tokenized"])
    assert ids == record["prompt_ids"] + record["ids"] and labels == labels_of(record)
    assert Path(names["config"].chat_template_path).is_file()


def labels_of(record):
    pairs = zip(record["ids"], record["loss_mask"])
    return [-100] * len(record["prompt_ids"]) + [id if mask else -100 for id, mask in pairs]


def test_trl_tokenizes_a_pool_as_we_do_with_our_template(tmp_path):
    tokenizer = tiny_tokenizer()
    file, record, template = pool_of(tmp_path, tokenizer)
    ids, labels = by_trl(file, tokenizer, tmp_path, template)
    assert ids == record["prompt_ids"] + record["ids"]
    assert labels == labels_of(record)


@pytest.mark.skipif(QWEN3 is None, reason="MTSQL_QWEN3_TOKENIZER names no folder")
def test_qwen3_with_our_template_and_with_trls(tmp_path):
    """With TRL's own template, the difference is an empty thought in the reply without one, and the
    trained line break after each reply."""
    tokenizer = AutoTokenizer.from_pretrained(QWEN3)
    file, record, template = pool_of(tmp_path, tokenizer)
    ids, labels = by_trl(file, tokenizer, tmp_path, template)
    assert ids == record["prompt_ids"] + record["ids"]
    assert labels == labels_of(record)
    # TRL knows a template by its text, and earlier revisions of Qwen3's are not known to it.
    tokenizer.chat_template = import_module("trl.chat_template_utils").qwen3_chat_template
    ids, labels = by_trl(file, tokenizer, tmp_path, None)
    text, ours = tokenizer.decode(ids), tokenizer.decode(record["prompt_ids"] + record["ids"])
    second = record["messages"][3]["content"]
    assert text == ours.replace(second, f"<think>\n\n</think>\n\n{second}") + "\n"
    trained = tokenizer.decode([label for label in labels if label != -100])
    assert trained.count("<|im_end|>\n") == 3
