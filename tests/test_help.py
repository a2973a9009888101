"""What `--help` prints: the order of its parts, every flag, its width."""

import importlib
import re
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path

import eval as eval_script
import pytest
import train_rl
import train_sft

from mtsql.audit.config import Config as AuditConfig
from mtsql.run.config import flat, parse_config, to_dict
from mtsql.run.help import field_docstrings, help_text, sections_of, wrapped

SCRIPTS = {
    "train_rl": (train_rl.Config, train_rl.__doc__),
    "train_sft": (train_sft.Config, train_sft.__doc__),
    "eval": (eval_script.Config, eval_script.__doc__),
    "audit": (AuditConfig, importlib.import_module("mtsql.commands.audit").__doc__),
}
BENCHMARKS = ["attacks", "judge", "rollout", "sql", "step", "trl_rollout", "update"]
UNITS = {
    "_bytes": "[Bb]ytes",
    "_secs": "[Ss]econds",
    "_frac": "[Ff]raction",
    "_tokens": "[Tt]okens",
    "_chars": "[Cc]haracters",
}


@dataclass(frozen=True)
class Inner:
    """A part. It has
    two sentences."""

    rate: float = 1e-6
    """How fast."""


@dataclass(frozen=True)
class Outer:
    """All flags."""

    name: str
    """What it is called."""
    part: Inner = Inner(rate=0.5)
    env: Inner = field(default_factory=Inner)
    """The second one."""
    extra: Inner | None = None
    """May be off."""
    kinds: tuple[str, ...] = ("a", "b")
    """Which ones."""
    is_on: bool | None = None
    """null: as before."""


def test_a_page_by_hand(monkeypatch):
    monkeypatch.setattr("sys.argv", ["somewhere/script.py"])
    description = "Does it.\n\n    python script.py --name x   # once\n"
    assert help_text(Outer, description, width=50) == (
        "usage: script.py [--config FILE] [--KEY VALUE ...]\n\n"
        "Does it.\n\n"
        "    python script.py --name x   # once\n\n"
        "Help and recipes\n"
        "  --help [SECTION]\n"
        "      Print this page, or one section: run, part,\n"
        "      env, extra.\n"
        "  --config FILE\n"
        "      A YAML recipe. Flags after it win over it.\n"
        "  --print_config\n"
        "      Print the configuration that would run, and\n"
        "      exit.\n"
        "  N is a whole number, X a number, SIZE a number\n"
        "  of bytes such as 8GB or 512MiB, null no value.\n\n"
        "Run\n"
        "  --name TEXT (required)\n"
        "      What it is called.\n"
        "  --kinds [TEXT, ...] (default: [a, b])\n"
        "      Which ones.\n"
        "  --is_on true|false|null (default: null)\n"
        "      null: as before.\n\n"
        "Part\n"
        "  A part.\n"
        "  --part.rate X (default: 0.5)\n"
        "      How fast.\n\n"
        "Environment (env)\n"
        "  The second one. The keys are those of part.\n"
        "  --env.rate X (default: 1e-06)\n\n"
        "Extra\n"
        "  May be off. `--extra null` switches it off\n"
        "  (default: off). The keys are those of part.\n"
        "  --extra.rate X (default: 1e-06)"
    )


def test_the_first_line_fits_a_narrow_terminal(monkeypatch):
    monkeypatch.setattr("sys.argv", ["somewhere/script.py"])
    lines = help_text(Outer, "", width=30).splitlines()
    assert lines[:2] == ["usage: script.py [--config", "  FILE] [--KEY VALUE ...]"]


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_fits_the_terminal_and_leaves_no_flag_out(name, width):
    kind, description = SCRIPTS[name]
    page = help_text(kind, description, width=width)
    assert max(map(len, page.splitlines())) <= width
    shown = set(re.findall(r"^  --([\w.]+) ", page, flags=re.M))
    assert shown - {"help", "config"} == set(flat(to_dict(kind())))
    assert "(type: " not in page and "CONFIG" not in page
    titles = re.findall(r"^([A-Z].*)\n  \S", page, flags=re.M)
    assert titles[:2] == ["Help and recipes", "Run"]
    assert page.startswith("usage: ") and page.index(description[:20]) < page.index("--help [")
    assert len(titles) == len(set(titles))


def test_the_commands_of_a_description_keep_their_lines():
    text = "Prose that is\nfilled.\n\n    python a.py --one 1   # short\n    python b.py\n"
    assert wrapped(text, 80) == (
        "Prose that is filled.\n\n    python a.py --one 1   # short\n    python b.py"
    )
    assert wrapped(text, 28).endswith("    # short\n    python a.py --one 1\n    python b.py")
    long = "    python a.py --one 1 \\\n        --two [1, 2]   # both\n"
    assert wrapped(long, 80) == long.rstrip()
    assert wrapped(long, 26) == "    # both\n    python a.py --one 1 \\\n        --two [1, 2]"
    assert wrapped("(1) one\ntwo (2) three\nfour", 12) == "(1) one two\n(2) three\n    four"
    assert wrapped("- one\n  two\n- three", 80) == "- one two\n- three"


def flags_of(kind):
    return [flag for section in sections_of(kind, {}) for flag in section.flags]


@pytest.mark.parametrize("name", [*SCRIPTS, *BENCHMARKS])
def test_every_flag_says_what_it_means_and_in_which_unit(name, monkeypatch):
    if name in BENCHMARKS:
        monkeypatch.syspath_prepend(Path(train_rl.__file__).parent / "benchmarks")
        kind = importlib.import_module(name).Flags
    else:
        kind, _ = SCRIPTS[name]
    flags = flags_of(kind)
    assert not [flag.key for flag in flags if len(flag.meaning) < 10]
    for flag in flags:
        for ending, unit in UNITS.items():
            if flag.key.endswith(ending):
                assert re.search(unit, flag.meaning), flag
        if flag.form.endswith("|null") and flag.default is None:
            text = flag.meaning.replace("null", "")
            assert text != flag.meaning or "(default: " in text or "ptional" in text, flag


def test_a_section_and_a_single_flag_can_be_asked_for(capsys):
    def printed(*flags):
        with pytest.raises(SystemExit) as stop:
            parse_config(train_rl.Config, list(flags), "", train_rl.PRESETS)
        assert stop.value.code == 0
        return capsys.readouterr().out

    optim = printed("--help", "optim")
    assert (
        optim.startswith("Optimizer (optim)\n")
        and f"--optim.lr X (default: {train_rl.Config().optim.lr})" in optim
    )
    assert "--warm_start" not in optim and "--run" not in optim
    assert printed("--optim.help") == printed("--help=optim") == optim
    assert "--reward.weights.ex" in printed("--help", "reward")
    assert printed("--help", "--optim.lr").count("\n") == 4
    assert "--preset cispo|dapo|" in printed("-h", "run")
    warm_start = printed("--help", "warm_start")
    assert "--warm_start.optim.lr X (default: 0.003)\n      Peak" in warm_start
    assert printed("--num_updates", "x", "--help").startswith("usage: ")
    with pytest.raises(ValueError, match=r"--help optin: no such section \(did you mean optim\?\)"):
        printed("--help", "optin")


def test_the_docstrings_of_a_parent_count():
    @dataclass(frozen=True)
    class Child(Inner):
        """A child."""

        rate: float = 3.0

    assert is_dataclass(Child) and field_docstrings(Inner) == {"rate": "How fast."}
    assert flags_of(Child)[0].meaning == "How fast." and flags_of(Child)[0].default == 3.0
