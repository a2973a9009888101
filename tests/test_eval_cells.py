"""The parts of an evaluation: their names, and which flags make them."""

from types import SimpleNamespace

import eval as eval_script
import pytest

from helpers.models import save_embedded
from mtsql.engine.sampling import SamplingConfig
from mtsql.eval_cells import cells_of, num_skipped
from mtsql.sql.datasets import DataConfig
from mtsql.sql.dialogues import Corpus, Skip

REAL = DataConfig(dev="data/sparc/dev.json", databases="data/database")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The configuration of a model that is there."""
    folder = save_embedded(tmp_path_factory.mktemp("model") / "model")
    return eval_script.ModelConfig(path=str(folder))


def names(**keys):
    return [cell.name for cell in cells_of(eval_script.Config(**keys))]


def test_data_sets_are_called_after_folder_and_file():
    both = names(data=REAL, out_of_domain=("data/cosql/dev.json",))
    assert both == [
        "sparc dev, gold",
        "sparc dev, predicted",
        "cosql dev, gold",
        "cosql dev, predicted",
    ]
    assert names(history="gold") == ["toyworld dev_seen, gold", "toyworld dev, gold"]
    assert names(history="predicted", split="train") == ["toyworld train, predicted"]
    [cell] = cells_of(eval_script.Config(data=REAL, history="gold"))
    assert cell.file_stem == "sparc-dev-gold"
    with pytest.raises(ValueError, match="two files of this evaluation are called sparc dev"):
        names(data=REAL, out_of_domain=("elsewhere/sparc/dev.csv",))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_samples": 0}, "num_samples is 0: it must be at least 1"),
        ({"timed_turns": -1}, "timed_turns is -1"),
        ({"num_samples": 4}, "at sampling.temperature 0 all samples are the same"),
        ({"seed": 1}, "seed has no effect at sampling.temperature 0"),
        ({"split": "dev_seen", "data": REAL}, "split is dev_seen, but data.dev_seen is not set"),
        ({"out_of_domain": ("a/b.json",)}, "data.dev and data.databases are not"),
    ],
)
def test_a_key_without_effect_or_out_of_range_is_an_error(keys, words, model):
    with pytest.raises(ValueError, match=words):
        eval_script.Config(model=model, **keys).completed()


def test_sampling_has_a_seed_and_several_samples(model):
    keys = {"num_samples": 4, "seed": 3, "sampling": SamplingConfig(temperature=0.7)}
    assert eval_script.Config(model=model, resume="runs/e", **keys).completed().run == "runs/e"


def test_the_turns_that_are_not_scored_are_those_of_the_dialogues_in_use():
    dialogues = [SimpleNamespace(dialogue_id=f"dev:{name}") for name in ("7", "0", "2:goal")]
    skips = [Skip("dev.json", index, "no SQL", num) for index, num in ((1, 8), (2, 3), (7, 4))]
    corpus = Corpus(dialogues, {}, skips)
    assert num_skipped(corpus, dialogues) == 15
    assert num_skipped(corpus, dialogues[1:]) == num_skipped(corpus, dialogues[:0:-1]) == 3
    assert num_skipped(corpus, dialogues[:1]) == 4
    assert num_skipped(corpus, dialogues[1:2]) == 0
