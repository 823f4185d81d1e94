"""Weights to and from Hugging Face: the same hidden states as transformers, and the way back exactly."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, ElectraConfig, PreTrainedTokenizerFast, RobertaConfig

from tokprune_exp.data.batch import Batch
from tokprune_exp.data.tokenise import encode_texts
from tokprune_exp.encoder.backbone import Backbone, RandomShape
from tokprune_exp.encoder.pretrained import (
    encoder_from_transformers,
    load_backbone,
    locate,
    shape_of,
    to_transformers,
)
from tokprune_exp.errors import DataUnavailableError, UserError
from tokprune_exp.head import Head
from tokprune_exp.model import PrunedClassifier

FAMILIES = ["bert", "roberta", "distilbert"]
LENGTHS = [23, 1, 2, 3, 40, 11, 5]
SENTENCES = [
    "a gripping, beautifully acted film that never once lets go",
    "dull",
    "the plot makes no sense, the jokes fall flat and, at well over two hours, it simply refuses to end. " * 6,
    "not bad, not good",
]

Build = Callable[..., Any]


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """Transformers' last hidden states; it is told of padding by its attention mask only."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.valid.long()}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = batch.token_type_ids
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def assert_same_hidden_states(model: PrunedClassifier, theirs: Any, batch: Batch) -> None:
    for execution in ("masked", "gathered"):
        with torch.no_grad():
            encoded = model.encoder(*model.start(batch, execution))
        ours = encoded.hidden if execution == "gathered" else encoded.hidden[batch.valid]
        torch.testing.assert_close(ours, hidden_states(theirs, batch)[batch.valid], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 7, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_those_of_transformers_on_ragged_batches(
    family: str, size: int, random_transformer: Build, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(family=family)
    batch = ragged_batch(model, (LENGTHS * 5)[:size], extra=2)
    assert_same_hidden_states(model, random_transformer(family), batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_those_of_transformers_at_the_sizes_of_a_real_encoder(
    family: str, random_transformer: Build, random_classifier: Build, ragged_batch: Build
) -> None:
    sizes = {"dim": 384, "heads": 12, "layers": 6, "positions": 512}
    model = random_classifier(family=family, **sizes)
    theirs = random_transformer(family, **sizes)
    assert_same_hidden_states(model, theirs, ragged_batch(model, [512, 130, 7, 1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_to_transformers_is_exact(family: str, random_transformer: Build) -> None:
    theirs = random_transformer(family)
    encoder = encoder_from_transformers(theirs)
    back = to_transformers(encoder, theirs.config)
    assert type(back) is type(theirs)
    expected = {name: tensor for name, tensor in theirs.state_dict().items() if "pooler" not in name}
    assert len(expected) == len(encoder.state_dict())
    for name, tensor in expected.items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shortened_encoder_goes_back_as_a_model_of_its_own_depth(family: str, random_transformer: Build) -> None:
    theirs = random_transformer(family)
    back = to_transformers(encoder_from_transformers(theirs).first_layers(2), theirs.config)
    assert back.config.num_hidden_layers == 2 and theirs.config.num_hidden_layers == 4
    for name, tensor in back.state_dict().items():
        assert "pooler" in name or torch.equal(tensor, theirs.state_dict()[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_copies_so_that_training_ours_does_not_change_theirs(family: str, random_transformer: Build) -> None:
    theirs = random_transformer(family)
    before = copy.deepcopy(theirs.state_dict())
    encoder = encoder_from_transformers(theirs)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 3])
def test_the_first_layers_equal_a_transformers_model_of_that_depth(
    family: str, count: int, random_transformer: Build, ragged_batch: Build
) -> None:
    theirs = random_transformer(family)
    config = copy.deepcopy(theirs.config)
    config.num_hidden_layers = count
    shorter = AutoModel.from_config(config).eval()
    shorter.load_state_dict({name: theirs.state_dict()[name] for name in shorter.state_dict()})
    student = encoder_from_transformers(theirs).first_layers(count)
    assert student.shape.layers == len(student.layers) == count
    model = PrunedClassifier(student, Head(64, 2), None, separator=3).eval()
    assert_same_hidden_states(model, shorter, ragged_batch(model, LENGTHS))


@pytest.mark.parametrize("count", [0, 5])
def test_a_depth_that_the_backbone_does_not_have_is_refused(count: int, random_transformer: Build) -> None:
    with pytest.raises(ValueError, match=rf"backbone\.layers={count}, but this backbone has layers 1 to 4"):
        encoder_from_transformers(random_transformer()).first_layers(count)


def test_roberta_counts_positions_from_two_and_padding_does_not_move_them(
    random_transformer: Build, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(family="roberta")
    assert (model.encoder.shape.position_offset, model.encoder.shape.pad_token) == (2, 1)
    batch = ragged_batch(model, [6, 2], extra=3)
    assert (batch.input_ids[1, 2:] == 1).all()
    embedded, _ = model.start(batch)
    theirs = random_transformer("roberta").embeddings(input_ids=batch.input_ids)
    torch.testing.assert_close(embedded[batch.valid], theirs[batch.valid], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_is_read_from_the_configuration(family: str, random_transformer: Build) -> None:
    config = random_transformer(family).config
    shape = shape_of(config, dropout=0.3)
    assert (shape.vocabulary, shape.dim, shape.heads, shape.layers, shape.ff_dim) == (300, 64, 4, 4, 256)
    assert (shape.max_tokens, shape.dropout) == (128, 0.3)
    assert shape.token_types == {"bert": 2, "roberta": 1, "distilbert": 0}[family]
    assert shape.norm_eps == {"bert": 1e-12, "roberta": 1e-5, "distilbert": 1e-12}[family]


def test_a_model_type_without_a_mapping_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="model type electra is not supported; there are bert, roberta, distilbert"):
        shape_of(ElectraConfig(), dropout=0.1)


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
def test_an_activation_that_is_not_computed_here_is_refused_by_name(activation: str) -> None:
    with pytest.raises(UserError, match=activation):
        shape_of(BertConfig(hidden_act=activation), dropout=0.1)


def test_relative_positions_are_refused_by_name() -> None:
    config = RobertaConfig()
    config.position_embedding_type = "relative_key"
    with pytest.raises(UserError, match="relative_key"):
        shape_of(config, dropout=0.1)


@pytest.fixture
def saved_backbone(random_transformer: Build, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A directory as Hugging Face writes it: a small BERT with pooler, and the tiny tokenizer."""
    directory = tmp_path / "weights" / "small"
    random_transformer("bert").save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


def test_a_backbone_from_a_directory_is_in_training_mode_with_its_dropout_and_pooler(
    saved_backbone: Path, random_transformer: Build, tmp_path: Path
) -> None:
    loaded = load_backbone(Backbone(name="small", path=str(saved_backbone), dropout=0.2), str(tmp_path))
    assert all(module.training for module in loaded.encoder.modules())
    assert {module.p for module in loaded.encoder.modules() if isinstance(module, nn.Dropout)} == {0.2}
    assert all(layer.attention_dropout == 0.2 for layer in loaded.encoder.layers)
    assert all(parameter.requires_grad for parameter in loaded.encoder.parameters())
    assert loaded.source == str(saved_backbone)
    theirs = random_transformer("bert").state_dict()
    assert loaded.pooler is not None and torch.equal(loaded.pooler["weight"], theirs["pooler.dense.weight"])
    assert torch.equal(loaded.encoder.layers[3].output.weight, theirs["encoder.layer.3.output.dense.weight"])


def test_a_checkpoint_without_pooler_gives_none_rather_than_random_weights(
    random_transformer: Build, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    theirs = copy.deepcopy(random_transformer("bert"))
    theirs.pooler = None
    theirs.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert load_backbone(Backbone(name="small", path=str(tmp_path)), str(tmp_path)).pooler is None


def test_half_precision_checkpoints_are_loaded_in_fp32(
    random_transformer: Build, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    copy.deepcopy(random_transformer("bert")).half().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    encoder = load_backbone(Backbone(name="small", path=str(tmp_path)), str(tmp_path)).encoder
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_a_backbone_can_be_shortened(saved_backbone: Path, tmp_path: Path) -> None:
    loaded = load_backbone(Backbone(name="small", path=str(saved_backbone), layers=2), str(tmp_path))
    assert loaded.encoder.shape.layers == len(loaded.encoder.layers) == 2


def test_a_random_backbone_takes_its_tokenizer_from_the_directory_and_its_sizes_from_the_configuration(
    saved_backbone: Path, tmp_path: Path
) -> None:
    backbone = Backbone(
        name="small", path=str(saved_backbone), random=RandomShape(dim=24, heads=3, layers=2, ff_dim=40)
    )
    loaded = load_backbone(backbone, str(tmp_path))
    shape = loaded.encoder.shape
    assert (shape.dim, shape.heads, shape.layers, shape.ff_dim) == (24, 3, 2, 40)
    assert (shape.vocabulary, shape.pad_token) == (len(loaded.tokenizer), loaded.tokenizer.pad_token_id)
    assert loaded.pooler is None and loaded.encoder.training
    weights = loaded.encoder.layers[0].query.weight
    assert weights.std().item() == pytest.approx(0.02, rel=0.2)


def test_the_explicit_path_comes_before_the_weights_root_and_that_before_the_hub(
    saved_backbone: Path, tmp_path: Path
) -> None:
    root = str(saved_backbone.parent)
    everything = Backbone(name="small", path=str(saved_backbone), weights_root=root, hub="someone/small", revision="v1")
    assert locate(everything, str(tmp_path)) == (str(saved_backbone), None)
    everything.path = None
    assert locate(everything, str(tmp_path)) == (str(Path(root) / "small"), None)
    everything.name = "another"
    assert locate(everything, str(tmp_path)) == ("someone/small", "v1")


def test_a_path_without_weights_is_an_error_and_not_a_reason_to_look_elsewhere(
    saved_backbone: Path, tmp_path: Path
) -> None:
    backbone = Backbone(name="small", path=str(tmp_path / "nowhere"), weights_root=str(saved_backbone.parent))
    with pytest.raises(DataUnavailableError, match=r"backbone\.path=.*nowhere: .*config\.json"):
        locate(backbone, str(tmp_path))


def test_a_backbone_without_any_source_says_which_key_to_set(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailableError, match=r"backbone nameless names no source; set backbone\.path=DIR"):
        locate(Backbone(name="nameless", weights_root=None), str(tmp_path))


def assert_equals_transformers_on_sentences(directory: Path, cache: Path) -> None:
    loaded = load_backbone(Backbone(name="real", path=str(directory)), str(cache))
    theirs = AutoModel.from_pretrained(str(directory), dtype=torch.float32).eval()
    batch = encode_texts(loaded.tokenizer, SENTENCES, 256).collate(range(len(SENTENCES)))
    shape = loaded.encoder.shape
    model = PrunedClassifier(loaded.encoder, Head(shape.dim, 2), None, loaded.tokenizer.sep_token_id).eval()
    assert_same_hidden_states(model, theirs, batch)
    back = to_transformers(loaded.encoder, theirs.config).state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items() if "pooler" not in name)


def test_minilm_l6_equals_transformers_on_real_sentences(minilm_directory: Path, tmp_path: Path) -> None:
    assert_equals_transformers_on_sentences(minilm_directory, tmp_path)


def test_gte_small_equals_transformers_on_real_sentences(shared_weights: Path, tmp_path: Path) -> None:
    if not (shared_weights / "gte_small").is_dir():
        pytest.skip(f"no gte_small in {shared_weights}")
    assert_equals_transformers_on_sentences(shared_weights / "gte_small", tmp_path)
