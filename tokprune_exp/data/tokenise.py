"""Token ids of texts: computed once, kept flat in memory and on disk, padded only when a batch is put together."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress
from pathlib import Path

import torch
from filelock import BaseFileLock, FileLock
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from tokprune_exp.data.batch import Batch
from tokprune_exp.errors import UserError

Text = str | tuple[str, str]
"""One text, or a pair."""

CHUNK = 4096
"""Texts between two steps of the progress bar."""
UNKNOWN_LABEL = -1
"""The label of a text that is to be predicted."""


@dataclass
class EncodedSplit:
    """The texts of a split and their tokens, all in one row: sequence i is `input_ids[offsets[i]:offsets[i + 1]]`.

    `fingerprint` is the sha256 of all that determines the tokens, and of the labels; what is computed per token or per
    example (teacher signals) can be stored under it.
    """

    texts: Sequence[Text]
    input_ids: Int[Tensor, " tokens"]
    token_type_ids: Int[Tensor, " tokens"]
    offsets: Int[Tensor, " examples_and_end"]
    labels: Int[Tensor, " examples"] | Float[Tensor, " examples"]
    pad_id: int
    fingerprint: str
    teacher_logits: Float[Tensor, "examples classes"] | None = None
    teacher_attribution: Float[Tensor, " tokens"] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Int[Tensor, " examples"]:
        """Tokens of each sequence, special tokens included."""
        return self.offsets.diff()

    def attach_teacher(
        self,
        logits: Float[Tensor, "examples classes"],
        attribution: Float[Tensor, " tokens"],
    ) -> None:
        """Keep a teacher's logits per example and its attribution per token (flat, as `input_ids`) for the batches.

        Raises:
            ValueError: the signals are of other examples or of other tokens.
        """
        if len(logits) != len(self) or attribution.shape != self.input_ids.shape:
            raise ValueError(
                f"teacher signals of {len(logits)} examples and {len(attribution)} tokens cannot be attached to a "
                f"split of {len(self)} examples and {len(self.input_ids)} tokens"
            )
        self.teacher_logits = logits
        self.teacher_attribution = attribution

    def where(self, keep: Bool[Tensor, " examples"]) -> "EncodedSplit":
        """The examples that are marked as a split of their own, in their order, with a fingerprint of its own."""
        of_token = keep.repeat_interleave(self.lengths)
        attribution = self.teacher_attribution
        return replace(
            self,
            texts=list(compress(self.texts, keep.tolist())),
            input_ids=self.input_ids[of_token],
            token_type_ids=self.token_type_ids[of_token],
            offsets=torch.cat([self.offsets[:1], self.lengths[keep].cumsum(0)]),
            labels=self.labels[keep],
            fingerprint=sha256_of(self.fingerprint, keep.nonzero().flatten().tolist()),
            teacher_logits=None if self.teacher_logits is None else self.teacher_logits[keep],
            teacher_attribution=None if attribution is None else attribution[of_token],
        )

    def collate(self, indices: Sequence[int] | Int[Tensor, " batch"]) -> Batch:
        """The examples `indices` as a batch that is as wide as its longest sequence; padding has attribution 0."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        starts, lengths = self.offsets[index], self.lengths[index]
        column = torch.arange(int(lengths.max()))
        valid = column < lengths[:, None]
        position = (starts[:, None] + column)[valid]
        return Batch(
            input_ids=padded(self.input_ids[position].long(), valid, self.pad_id),
            token_type_ids=padded(self.token_type_ids[position].long(), valid, 0),
            valid=valid,
            labels=self.labels[index],
            index=index,
            teacher_logits=None if self.teacher_logits is None else self.teacher_logits[index],
            teacher_attribution=(
                None if self.teacher_attribution is None else padded(self.teacher_attribution[position], valid, 0)
            ),
        )


def padded(tokens: Tensor, valid: Bool[Tensor, "batch width"], fill: int) -> Tensor:
    """The flat `tokens` in the places that are valid, `fill` in the others."""
    return torch.full(valid.shape, fill, dtype=tokens.dtype).masked_scatter(valid, tokens)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    max_tokens: int,
    labels: Tensor | None = None,
    cache: Path | None = None,
) -> EncodedSplit:
    """The tokens of `texts`: at most `max_tokens` or what the model can take, of a pair the longer text cut first.

    Without `labels` (prediction) every label is `UNKNOWN_LABEL`. With `cache` the tokens are kept there under the
    fingerprint, and read from there the next time.
    """
    labels = torch.full((len(texts),), UNKNOWN_LABEL) if labels is None else labels
    backend = truncating_backend(tokenizer, max_tokens)
    has_types = "token_type_ids" in tokenizer.model_input_names
    fingerprint = sha256_of(backend.to_str(), has_types, list(texts), labels.tolist())
    file = None if cache is None else cache / f"{fingerprint}.safetensors"
    if file is not None and file.is_file():
        tokens = load_file(file)
    else:
        tokens = tokenise(backend, texts, has_types)
        if file is not None:
            save_at_once(tokens, file)
    if not isinstance(tokenizer.pad_token_id, int):
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no padding token, which batches need")
    return EncodedSplit(texts, **tokens, labels=labels, pad_id=tokenizer.pad_token_id, fingerprint=fingerprint)


def truncating_backend(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Tokenizer:
    """A copy of the Rust tokenizer that truncates as asked and pads nothing, whatever tokenizer.json said of either."""
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} is not a fast one (it has no tokenizer.json)")
    backend: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.enable_truncation(min(max_tokens, tokenizer.model_max_length), strategy="longest_first")
    return backend


def tokenise(backend: Tokenizer, texts: Sequence[Text], has_types: bool) -> dict[str, Tensor]:
    """Ids, types (0 where the model knows none) and offsets of all texts, flat."""
    ids: list[Tensor] = []
    types: list[Tensor] = []
    lengths: list[int] = [0]
    with tqdm(total=len(texts), desc="tokenising", unit=" texts", disable=len(texts) <= CHUNK, leave=False) as bar:
        for start in range(0, len(texts), CHUNK):
            encodings = backend.encode_batch_fast(list(texts[start : start + CHUNK]))
            ids.append(flat(encoding.ids for encoding in encodings))
            types.append(flat(encoding.type_ids for encoding in encodings))
            lengths.extend(len(encoding.ids) for encoding in encodings)
            bar.update(len(encodings))
    input_ids = torch.cat(ids)
    token_type_ids = torch.cat(types) if has_types else torch.zeros_like(input_ids)
    return {"input_ids": input_ids, "token_type_ids": token_type_ids, "offsets": torch.tensor(lengths).cumsum(0)}


def flat(sequences: Iterable[list[int]]) -> Int[Tensor, " tokens"]:
    """All numbers in one row."""
    return torch.tensor(list(chain.from_iterable(sequences)), dtype=torch.int32)


def sha256_of(*parts: object) -> str:
    """The sha256 of plain values, told apart by their JSON."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def only_one(file: Path) -> BaseFileLock:
    """Return a lock on a file that several runs would make; it is free again when its holder ends, however that is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file.with_suffix(".lock"))


def save_at_once(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a file that other jobs see either whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        save_file(tensors, Path(scratch) / file.name)
        os.replace(Path(scratch) / file.name, file)
