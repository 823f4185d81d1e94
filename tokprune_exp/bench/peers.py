"""The peers: the same weights, dense and padded, in transformers, ONNX Runtime and OpenVINO.

ONNX Runtime and OpenVINO read one file, exported from transformers' model. All get the same number of threads; each is
otherwise used as it comes, but OpenVINO's precision is named, since it would choose bf16 by itself.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokprune_exp.bench.texts import Reads
from tokprune_exp.bench.variants import Variant
from tokprune_exp.data.batch import Batch
from tokprune_exp.encoder.pretrained import to_transformers, transformers_config
from tokprune_exp.model import PrunedClassifier
from tokprune_exp.precision import use_fast_exact_float32

TOLERANCE = 1e-3
"""Largest difference of logits at which a peer in fp32 counts as the same model."""
OPSET = 17
NOT_INSTALLED = "not installed: pip install 'tokprune_exp[bench]'"

Logits = Float[Tensor, "batch outputs"]


class PlainTransformers(nn.Module):
    """The same weights in transformers' own model, unpruned and padded, with our head on the first token."""

    def __init__(self, model: PrunedClassifier) -> None:
        super().__init__()
        self.encoder = to_transformers(model.encoder, transformers_config(model.encoder.shape))
        self.encoder.pooler = None  # it has no weights of ours, and the head holds the pooler
        self.head = model.head
        self.takes_types = model.encoder.shape.token_types > 0
        self.eval()

    def inputs(self, batch: Batch) -> dict[str, Int[Tensor, "batch tokens"]]:
        """Return a padded batch under transformers' names."""
        types = {"token_type_ids": batch.token_type_ids} if self.takes_types else {}
        return {"input_ids": batch.input_ids, "attention_mask": batch.valid.long(), **types}

    def forward(self, batch: Batch) -> Logits:
        """Compute logits of a padded batch."""
        return self.classify(*self.inputs(batch).values())

    def classify(self, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> Logits:
        """Compute logits of tensors: what can be exported."""
        given = {} if types is None else {"token_type_ids": types}
        return self.head(self.encoder(input_ids=ids, attention_mask=mask, **given).last_hidden_state[:, 0])


def find_peers(
    names: Sequence[str], model: PrunedClassifier, threads: int, folder: Path, reference: str
) -> tuple[list[Variant], list[str]]:
    """Prepare the peers that are asked for and installed; return them and what is left out, and why.

    `folder` holds the exported model for as long as the peers are used.
    """
    plain = PlainTransformers(model)
    peers: list[Variant] = []
    notes: list[str] = []
    if "transformers" in names:
        found, said = transformers_peers(plain, reference)
        peers, notes = [*peers, *found], [*notes, *said]
    runtimes = [name for name in names if name != "transformers"]
    installed = [name for name in runtimes if find_spec(name) is not None]
    notes += [f"{name}: {NOT_INSTALLED}" for name in runtimes if name not in installed]
    if installed:
        file = export(plain, folder / "model.onnx")
        for name, prepare in (("onnxruntime", onnxruntime_peers), ("openvino", openvino_peers)):
            if name in installed:
                found, said = prepare(plain, file, threads, reference)
                peers, notes = [*peers, *found], [*notes, *said]
    return peers, notes


def transformers_peers(plain: PlainTransformers, reference: str) -> tuple[list[Variant], list[str]]:
    """Return transformers with PyTorch's default fp32 products and with oneDNN's where they are exact.

    The faster of the two also runs on unsorted batches, to tell what padding costs.
    """
    peer = partial(_peer, precision="fp32", reference=reference, is_exact=True)
    peers = [peer("transformers", "transformers", plain)]
    before = torch.get_float32_matmul_precision()
    is_exact = use_fast_exact_float32()
    torch.set_float32_matmul_precision(before)
    best: Callable[[Batch], Logits] = plain
    unsorted_key, unsorted_label = "transformers_unsorted", "transformers, unsorted"
    notes = []
    if is_exact:
        best = with_onednn_products(plain)
        peers.append(peer("transformers_onednn", "transformers, oneDNN", best))
        unsorted_key, unsorted_label = "transformers_onednn_unsorted", "transformers, oneDNN, unsorted"
    else:
        notes.append("transformers with oneDNN products: left out, they are not exact on this CPU.")
    return [*peers, peer(unsorted_key, unsorted_label, best, reads="unsorted")], notes


def with_onednn_products(forward: Callable[[Batch], Logits]) -> Callable[[Batch], Logits]:
    """Run a forward pass with oneDNN's fp32 products; the setting is one of the whole process, so it is taken back."""

    def run(batch: Batch) -> Logits:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            return forward(batch)
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def onnxruntime_peers(
    plain: PlainTransformers, file: Path, threads: int, reference: str
) -> tuple[list[Variant], list[str]]:
    """Return ONNX Runtime in fp32 and with weights and activations quantised to int8 on the way."""
    import onnxruntime

    def forward_of(path: Path) -> Callable[[Batch], Logits]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # errors only
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def forward(batch: Batch) -> Logits:
            (logits,) = session.run(None, {name: ids.numpy() for name, ids in plain.inputs(batch).items()})
            return torch.from_numpy(logits)

        return forward

    peers = [_peer("onnxruntime_fp32", "ONNX Runtime fp32", forward_of(file), "fp32", reference, is_exact=True)]
    if find_spec("onnx") is None:
        return peers, [f"onnxruntime int8: needs onnx, {NOT_INSTALLED}"]
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantised = file.with_name("model_int8.onnx")
    with quiet():
        quantize_dynamic(file, quantised, weight_type=QuantType.QInt8)
    return [*peers, _peer("onnxruntime_int8", "ONNX Runtime int8", forward_of(quantised), "int8", reference)], []


def openvino_peers(
    plain: PlainTransformers, file: Path, threads: int, reference: str
) -> tuple[list[Variant], list[str]]:
    """Return OpenVINO in fp32, and in bf16 where the CPU multiplies it."""
    import openvino

    core = openvino.Core()

    def forward_of(precision: str) -> Callable[[Batch], Logits]:
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core.compile_model(str(file), "CPU", settings)

        def forward(batch: Batch) -> Logits:
            answer = compiled({name: ids.numpy() for name, ids in plain.inputs(batch).items()})
            return torch.from_numpy(answer[0])

        return forward

    peers = [_peer("openvino_fp32", "OpenVINO fp32", forward_of("f32"), "fp32", reference, is_exact=True)]
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return peers, ["OpenVINO bf16: left out, this CPU does not multiply bf16."]
    return [*peers, _peer("openvino_bf16", "OpenVINO bf16", forward_of("bf16"), "bf16", reference)], []


def _peer(
    key: str,
    label: str,
    forward: Callable[[Batch], Any],
    precision: str,
    reference: str,
    reads: Reads = "sorted",
    is_exact: bool = False,
) -> Variant:
    return Variant(key, label, "peer", forward, reads, precision, reference, is_exact=is_exact)


@torch.no_grad()
def export(plain: PlainTransformers, file: Path) -> Path:
    """Write the model as ONNX, for any number of texts and of tokens.

    By torch's older exporter, since the newer one needs another package. Attention is written out: runtimes find it in
    that form, and ran it a little faster than an exported SDPA.
    """
    ids = torch.full((2, 5), 1)
    valid = torch.ones_like(ids)
    valid[1, 3:] = 0
    values = (ids, valid, torch.zeros_like(ids)) if plain.takes_types else (ids, valid)
    names = ["input_ids", "attention_mask", "token_type_ids"][: len(values)]
    attention = plain.encoder.config._attn_implementation
    plain.encoder.set_attn_implementation("eager")
    try:
        with quiet():
            torch.onnx.export(
                _Classify(plain),
                values,
                str(file),
                dynamo=False,
                opset_version=OPSET,
                input_names=names,
                output_names=["logits"],
                dynamic_axes={**{name: {0: "batch", 1: "tokens"} for name in names}, "logits": {0: "batch"}},
            )
    finally:
        plain.encoder.set_attn_implementation(attention)
    return file


class _Classify(nn.Module):
    """`PlainTransformers.classify` as a module, which is what is exported."""

    def __init__(self, plain: PlainTransformers) -> None:
        super().__init__()
        self.plain = plain
        self.eval()

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.plain.classify(*tensors)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what exporters warn of their own future and of their tracing off the screen: the logits are checked."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@torch.inference_mode()
def check_same_model(model: PrunedClassifier, peers: Sequence[Variant], batches: Sequence[Batch]) -> dict[str, float]:
    """Compare the logits of our dense fp32 model with every peer's; return the largest difference of each.

    A race of two models would say nothing, so a peer in fp32 must agree; in int8 or bf16 it cannot.

    Raises:
        RuntimeError: a peer in fp32 puts out other logits.
    """
    differences = dict.fromkeys((peer.key for peer in peers), 0.0)
    for batch in batches:
        ours = model(batch, "gathered", prune=False).logits
        for peer in peers:
            difference = float((ours - peer.forward(batch)).abs().max())
            if peer.is_exact and not difference <= TOLERANCE:
                raise RuntimeError(
                    f"{peer.label} with the same weights puts out other logits (by {difference:.2g}), so its time "
                    f"cannot be compared"
                )
            differences[peer.key] = max(differences[peer.key], difference)
    return differences
