"""mtsql env: the facts of a bug report, and nothing private."""

import builtins
import getpass
import os
import platform
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config import config_args

from mtsql.commands import env
from mtsql.model import attention_path
from mtsql.model.attention_path import FlashInstall


def facts() -> dict[str, str]:
    lines = [*env._software(), *env._machine(), *env._torch()]
    return dict(lines)


def test_the_report_is_text_of_one_fact_a_line(capsys):
    env.main([])
    found = {line[:18].strip(): line[19:] for line in capsys.readouterr().out.splitlines()}
    assert found["Python"].startswith(platform.python_version())
    assert found["SQLite"] == sqlite3.sqlite_version
    assert found["torch"] == torch.__version__
    for name in ("transformers", "accelerate", "peft", "jsonargparse"):
        assert found[name][0].isdigit()
    for name in ("mtsql", "flash-attn", "platform", "CPU", "cores", "memory", "threads of torch"):
        assert found[name]
    assert found["attention"] and found["Accelerate's file"]


def test_the_report_names_no_user_host_or_folder(capsys, monkeypatch, tmp_path):
    file = tmp_path / "default_config.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: bf16\n"
        "num_processes: 8\nnum_machines: 2\nmain_process_ip: private-host\nuse_cpu: false\n"
    )
    monkeypatch.setattr(config_args, "default_config_file", str(file))
    env.main([])
    text = capsys.readouterr().out
    assert "num_processes=8, mixed_precision=bf16" in text
    secrets = ("private-host", str(tmp_path), str(Path.home()), platform.node(), sys.prefix)
    for secret in (*secrets, getpass.getuser()):
        assert secret not in text, text


def test_a_torch_that_cannot_be_imported_is_a_fact(monkeypatch):
    usual = builtins.__import__

    def refuse(name, *rest):
        if name == "torch":
            raise OSError("/home/someone/lib/libtorch.so: undefined symbol: x")
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    found = facts()
    assert found["torch"] == "cannot be imported: libtorch.so: undefined symbol: x"
    assert found["SQLite"] and "attention" not in found


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let torch see GPUs."""
    gpu = SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.version, "cuda", "12.8")


def test_gpus_are_listed_with_memory_driver_and_cuda(monkeypatch, tmp_path):
    gpus(monkeypatch, 2)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = facts()
    assert found["GPU 0"] == found["GPU 1"] == "NVIDIA H100, 80.0 GiB, capability 9.0"
    assert found["CUDA of torch"] == "12.8" and found["GPU driver"] == "570.86.15"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert facts()["GPU driver"] == "unknown, nvidia-smi fails"
    monkeypatch.setenv("PATH", "")
    assert facts()["GPU driver"] == "unknown, there is no nvidia-smi"


def test_attention_and_its_reason(monkeypatch):
    gpus(monkeypatch, 0)
    assert facts()["attention"].startswith("torch's operators for CPUs (float32")
    gpus(monkeypatch, 1)
    installs = {
        FlashInstall("works", "2.8.3"): "flash-attn 2.8.3 (bfloat16, blocks of 256 tokens)",
        FlashInstall("missing"): "because flash-attn is not installed",
        FlashInstall("broken", "2.8.3", "/lib/x.so: undefined symbol"): "(x.so: undefined symbol)",
    }
    for install, words in installs.items():
        monkeypatch.setattr(attention_path, "FLASH_INSTALL", install)
        attention_path.path_for.cache_clear()
        assert words in facts()["attention"]
    attention_path.path_for.cache_clear()


def test_a_container_s_memory_limit_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(env, "MEMORY_LIMIT", tmp_path / "memory.max")
    assert "limited" not in facts()["memory"]
    for text in ("max\n", "999999999999999\n"):
        (tmp_path / "memory.max").write_text(text)
        assert "limited" not in facts()["memory"]
    (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
    assert facts()["memory"].endswith("GiB, limited to 1.0 GiB")


def test_an_accelerate_file_that_cannot_be_read_is_a_fact(monkeypatch, tmp_path):
    file = tmp_path / "default_config.yaml"
    monkeypatch.setattr(config_args, "default_config_file", str(file))
    assert env._accelerate_file() == "none"
    file.write_text("compute_environment: LOCAL_MACHINE\nno_such_key: 1\n")
    assert env._accelerate_file().startswith("cannot be read: ")
    assert str(tmp_path) not in env._accelerate_file()
