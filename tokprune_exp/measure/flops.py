"""What an encoder pass costs, in closed form from its `PruningTrace`, in every convention that is published.

Unit: one multiply-add (MAC) = 2 FLOPs. Counted are the matrix products of the encoder's layers, as everybody but
STTABT does: no embeddings, normalisation, softmax, activation or bias. Pruner and head stand on lines of their own.
STTABT's own counting, which has these too, is in `sttabt_flops.py`, for comparison with its tables.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tokprune_exp.encoder.cost import dense_encoder_macs, encoder_macs
from tokprune_exp.encoder.trace import PruningTrace

STTABT_CHUNK = 1024
"""Examples that STTABT pads together to the longest of them."""


def ltp_encoder_macs(trace: PruningTrace, dim: int, ff_dim: int) -> Int[Tensor, " batch"]:
    """Multiply-adds as LTP's code counts them (trainer.py:1646): the output projection is charged for Q, not O."""
    queries = trace.counts("queries")
    charged_late = (queries - trace.counts("outputs")).sum(1)
    return encoder_macs(trace, dim, ff_dim) + dim**2 * charged_late


@dataclass
class FlopsReport:
    """The cost of a whole evaluated split, gathered batch by batch from the traces of an encoder of this shape.

    Every `gflops_*` is a mean over examples, every `reduction_*` a ratio of sums over examples (= of those means),
    never a mean of ratios; only the two retention figures are means of shares, as their papers have them.
    """

    dim: int
    ff_dim: int
    _batches: list[dict[str, Tensor]] = field(default_factory=list, repr=False)

    def update(
        self,
        trace: PruningTrace,
        pruner_macs: Int[Tensor, " batch"] | int = 0,
        head_macs: int = 0,
        index: Int[Tensor, " batch"] | None = None,
    ) -> None:
        """Add one evaluated batch.

        Args:
            trace: of the hard, executed forward.
            pruner_macs: multiply-adds of scorer and retainer for each example, padding excluded.
            head_macs: multiply-adds of pooler and classifier for one example.
            index: each example's row in its split; without it the order of the updates is taken for STTABT's chunks.

        Raises:
            ValueError: for a trace without layers.
        """
        if not trace.layers:
            raise ValueError("the trace holds no layer, so there is nothing to count")
        lengths, examples = trace.lengths, len(trace.valid)
        seen = sum(len(batch["lengths"]) for batch in self._batches)
        per_example = {
            "index": torch.arange(seen, seen + examples) if index is None else index,
            "lengths": lengths,
            "encoder": encoder_macs(trace, self.dim, self.ff_dim),
            "ltp": ltp_encoder_macs(trace, self.dim, self.ff_dim),
            "dense": dense_encoder_macs(lengths, len(trace.layers), self.dim, self.ff_dim),
            "pruner": torch.as_tensor(pruner_macs).expand(examples),
            "head": torch.tensor(head_macs).expand(examples),
            "keys": trace.counts("keys"),
            "outputs": trace.counts("outputs"),
        }
        self._batches.append({name: value.detach().cpu() for name, value in per_example.items()})

    @property
    def lengths(self) -> Int[Tensor, " examples"]:
        """Tokens of each example, in the order of their index."""
        return self._counted()["lengths"]

    @property
    def token_sets(self) -> Int[Tensor, "examples sets"]:
        """|K^1|, |O^1|, …, |O^L| of each example, in the order of their index."""
        all_of = self._counted()
        return torch.cat([all_of["keys"][:, :1], all_of["outputs"]], dim=1)

    def where(self, keep: Bool[Tensor, " examples"]) -> "FlopsReport":
        """The report of the examples alone that are marked, in the order of their index."""
        return FlopsReport(self.dim, self.ff_dim, [{name: value[keep] for name, value in self._counted().items()}])

    def summary(self, published_length: int) -> dict[str, Any]:
        """Every published figure of the split, side by side; the names say which convention each one is.

        * `gflops_per_example` = `gflops_encoder` + `gflops_pruner`: executed, unpadded. `gflops_head` is not in it.
        * `reduction_unpadded`: unpruned encoder at the same unpadded lengths / (encoder + pruner). The honest one.
        * `reduction_padded`: unpruned encoder padded to `published_length` / (encoder + pruner), what ToP and AD-TP
          print; a text that is longer counts its own length, since padding never shortens.
        * `*_ltp_convention`: output projection charged for Q and the pruner free, as LTP's code counts.
        * `retention_*`: share of the real tokens that leaves a layer, |O| / n, averaged over examples.
        * `retention_padded_sttabt`: STTABT's mean over the L input masks and the final [CLS] mask, pads in the
          denominator, padded to the longest of each 1024 examples in the order of their index. For comparison only;
          it averages over examples where STTABT averages over batches, and takes |K| for the input mask.

        Raises:
            ValueError: when nothing was counted.
        """
        all_of = self._counted()
        lengths, layers = all_of["lengths"], all_of["outputs"].shape[1]
        padded_lengths = lengths.clamp(min=published_length)
        macs = {name: _mean(all_of[name]) for name in ("encoder", "pruner", "head", "dense", "ltp")}
        macs["dense_padded"] = _mean(dense_encoder_macs(padded_lengths, layers, self.dim, self.ff_dim))
        executed = macs["encoder"] + macs["pruner"]
        retention = (all_of["outputs"].double() / lengths[:, None]).mean(0)
        return {
            "examples": len(lengths),
            "mean_length": _mean(lengths),
            "published_length": published_length,
            "gmacs_per_example": executed / 1e9,
            "gmacs_dense": macs["dense"] / 1e9,
            "gflops_per_example": 2e-9 * executed,
            "gflops_encoder": 2e-9 * macs["encoder"],
            "gflops_pruner": 2e-9 * macs["pruner"],
            "gflops_head": 2e-9 * macs["head"],
            "gflops_dense": 2e-9 * macs["dense"],
            "gflops_dense_padded": 2e-9 * macs["dense_padded"],
            "gflops_ltp_convention": 2e-9 * macs["ltp"],
            "reduction_unpadded": macs["dense"] / executed,
            "reduction_padded": macs["dense_padded"] / executed,
            "reduction_ltp_convention": macs["dense"] / macs["ltp"],
            "retention_mean": retention.mean().item(),
            "retention_per_layer": retention.tolist(),
            "tokens_per_layer": all_of["outputs"].double().mean(0).tolist(),
            "retention_padded_sttabt": _padded_retention(lengths, all_of["keys"]),
        }

    def _counted(self) -> dict[str, Tensor]:
        """Everything that was counted, a row per example, in the order of their index."""
        if not self._batches:
            raise ValueError("no batch was counted: call update before summary")
        all_of = {name: torch.cat([batch[name] for batch in self._batches]) for name in self._batches[0]}
        order = all_of["index"].argsort(stable=True)
        return {name: value[order] for name, value in all_of.items()}


def count_with_fvcore(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    """Multiply-adds of `module(*inputs)` by operator, as fvcore counts them on a traced forward.

    fvcore's "flop" is one multiply-add. Layer normalisation is left out (it is no matrix product) and attention put
    in: fvcore knows no `scaled_dot_product_attention` and would drop it, saying so in a log line only.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fvcore uses torch.jit.script at import
        from fvcore.nn import FlopCountAnalysis  # two seconds of import, needed once per run

    analysis = FlopCountAnalysis(module, inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
    return {name: int(count) for name, count in analysis.by_operator().items() if name != "layer_norm"}


def check_against_fvcore(counted: dict[str, int], closed_form: int) -> None:
    """Compare fvcore's count of a forward with the closed form of its trace; they are integers and must be equal.

    Raises:
        RuntimeError: when they differ.
    """
    total = sum(counted.values())
    if total != closed_form:
        by_operator = ", ".join(f"{operator} {count:,}" for operator, count in sorted(counted.items()))
        raise RuntimeError(
            f"FLOPs disagree: fvcore counts {total:,} multiply-adds in the executed forward ({by_operator}), the "
            f"closed form of its trace {closed_form:,}; the FLOPs of this run would be wrong, so it stops here"
        )


def _mean(per_example: Int[Tensor, " examples"]) -> float:
    """Mean of integer counts, summed exactly."""
    return int(per_example.sum()) / len(per_example)


def _padded_retention(lengths: Int[Tensor, " examples"], keys: Int[Tensor, "examples layers"]) -> float:
    """STTABT's retention: mean over examples of (Σ_l |K_l| + 1) / ((L + 1)·T), T the chunk's longest text."""
    chunks = zip(lengths.split(STTABT_CHUNK), keys.split(STTABT_CHUNK), strict=True)
    kept_shares = [(kept.sum(1) + 1).double() / ((keys.shape[1] + 1) * length.max()) for length, kept in chunks]
    return torch.cat(kept_shares).mean().item()


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of one scaled_dot_product_attention: q·k·(d_k + d_v) for each batch entry and head."""
    query, key, value = (one.type().sizes() for one in inputs[:3])
    pairs = torch.Size([*query[:-1], key[-2]]).numel()
    return pairs * (query[-1] + value[-1])
