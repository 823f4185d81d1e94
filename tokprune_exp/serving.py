"""A trained model in use: texts in; labels, probabilities and the tokens that were kept out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Encoding
from torch import Tensor

from tokprune_exp.data.batches import BatchLoader, token_batches
from tokprune_exp.data.tokenise import UNKNOWN_LABEL, EncodedSplit, Text, flat, truncating_backend
from tokprune_exp.encoder.fast import DTYPES, Precision
from tokprune_exp.encoder.pretrained import load_tokenizer
from tokprune_exp.errors import UserError
from tokprune_exp.model import ClassifierOutput, ModelCard, PrunedClassifier, load_model


@dataclass
class Token:
    """A piece of the input: characters `start` to `end` of text `text` (0, or 1 for the second of a pair).

    The special tokens, [CLS] and [SEP], belong to no text: there `text` is None.
    """

    piece: str
    text: int | None
    start: int
    end: int


@dataclass
class Prediction:
    """The answer for one text (or pair) and the tokens that it was computed from.

    A classifier gives `label` and its `probability`; in regression both are None and `logits` holds the score.
    `kept[layer][token]` says whether a token went on through the feed-forward block of a layer, `read[token]` whether
    the last layer could still attend to it (behind that layer LTP and STTABT leave nothing but the first token).
    `truncated` says that the text was longer than the model reads, so that its end has no tokens.
    """

    text: Text
    label: str | None
    probability: float | None
    logits: list[float]
    tokens: list[Token]
    kept: list[list[bool]]
    read: list[bool]
    truncated: bool

    @property
    def tokens_kept(self) -> list[int]:
        """Number of tokens that each layer keeps, special tokens included."""
        return [sum(layer) for layer in self.kept]

    def __str__(self) -> str:
        answer = f"score {self.logits[0]:.3f}" if self.label is None else f"{self.label} {self.probability:.3f}"
        counts = f"tokens kept {' '.join(map(str, self.tokens_kept))} of {len(self.tokens)}"
        return f"{answer} · {counts}" + (" · truncated" if self.truncated else "")

    def stretches(self) -> list[list[tuple[str, bool]]]:
        """Cut each text into stretches and whether the last layer read them; what was truncated is left out.

        What stands between two tokens, mostly a space, is dropped only if both of them are.
        """
        texts = [self.text] if isinstance(self.text, str) else self.text
        return [_stretches(text, list(self._tokens_of(number))) for number, text in enumerate(texts)]

    def _tokens_of(self, text: int) -> Iterator[tuple[Token, bool]]:
        for token, is_kept in zip(self.tokens, self.read, strict=True):
            if token.text == text:
                yield token, is_kept


def _stretches(text: str, tokens: list[tuple[Token, bool]]) -> list[tuple[str, bool]]:
    """Cut one text at the borders between what was kept and what was dropped."""
    characters = []
    end, was_kept = 0, True
    for token, is_kept in tokens:
        characters += [(character, was_kept or is_kept) for character in text[end : token.start]]
        characters += [(character, is_kept) for character in text[max(end, token.start) : token.end]]
        end, was_kept = max(end, token.end), is_kept
    return [("".join(one for one, _ in run), kept) for kept, run in groupby(characters, key=lambda pair: pair[1])]


BATCH_TOKENS = 4096


class TextClassifier:
    """A trained model with its tokenizer, run gathered: pruned tokens and padding are not computed."""

    def __init__(
        self,
        model: PrunedClassifier,
        card: ModelCard,
        tokenizer: Any,
        precision: Precision = "fp32",
        device: str = "cpu",
    ) -> None:
        self.model, self.card, self.device = model.to(device).for_inference(precision), card, device
        self.backend = truncating_backend(tokenizer, card.max_tokens)
        self.has_types = "token_type_ids" in tokenizer.model_input_names

    def predict(self, texts: Sequence[Text], batch_tokens: int = BATCH_TOKENS) -> list[Prediction]:
        """Classify texts, or pairs of texts; the answers come in the order of the texts.

        Texts are sorted by length and packed into batches of at most `batch_tokens` tokens; no answer depends on the
        batch it was computed in. Texts longer than `card.max_tokens` are truncated, of a pair the longer text first,
        and the prediction says so.

        Raises:
            UserError: the texts are not of the kind that the model reads, one text or a pair.
        """
        encodings = self._encode(texts)
        predictions: list[Prediction | None] = [None] * len(texts)
        for rows, output in self._outputs(encodings, batch_tokens):
            masks = torch.stack([layer.outputs for layer in output.trace.layers], dim=1).cpu()  # (B, layers, N)
            read = output.trace.layers[-1].keys.cpu()
            for row, logits, *tokens in zip(rows.tolist(), output.logits.cpu(), masks, read, strict=True):
                predictions[row] = self._prediction(texts[row], encodings[row], logits, *tokens)
        return [prediction for prediction in predictions if prediction is not None]

    def logits(self, texts: Sequence[Text], batch_tokens: int = BATCH_TOKENS) -> Float[Tensor, "texts outputs"]:
        """Compute a logit per class, or one score, for each text, in the order of the texts.

        Raises:
            UserError: the texts are not of the kind that the model reads, one text or a pair.
        """
        logits = torch.zeros(len(texts), self.model.head.classifier.out_features)
        for rows, output in self._outputs(self._encode(texts), batch_tokens):
            logits[rows] = output.logits.cpu()
        return logits

    def _encode(self, texts: Sequence[Text]) -> list[Encoding]:
        if isinstance(texts, str):
            raise UserError("a list of texts is needed, not a single string: write [text]")
        for number, text in enumerate(texts):
            is_pair = not isinstance(text, str)
            if is_pair != self.card.pair:
                raise UserError(
                    f"text {number} is {'a pair' if is_pair else 'a single text'}, but this model of "
                    f"{self.card.task} reads {'pairs: (text, text)' if self.card.pair else 'single texts'}"
                )
        return self.backend.encode_batch(list(texts))

    @torch.inference_mode()
    def _outputs(self, encodings: list[Encoding], batch_tokens: int) -> Iterator[tuple[Tensor, ClassifierOutput]]:
        """Run the model batch by batch; yields the rows of a batch and what came out."""
        if batch_tokens < 1:
            raise UserError(f"batch_tokens={batch_tokens} must be at least 1")
        if not encodings:
            return
        input_ids = flat(one.ids for one in encodings)
        split = EncodedSplit(
            texts=[],
            input_ids=input_ids,
            token_type_ids=flat(one.type_ids for one in encodings) if self.has_types else torch.zeros_like(input_ids),
            offsets=torch.tensor([0, *(len(one) for one in encodings)]).cumsum(0),
            labels=torch.full((len(encodings),), UNKNOWN_LABEL),
            pad_id=self.model.encoder.shape.pad_token,
            fingerprint="",
        )
        for batch in BatchLoader(split, token_batches(split.lengths, batch_tokens)):
            yield batch.index, self.model(batch.to(self.device), "gathered")

    def _prediction(self, text: Text, encoding: Encoding, logits: Tensor, kept: Tensor, read: Tensor) -> Prediction:
        label, probability = None, None
        if self.card.labels:
            best = int(logits.argmax())
            label, probability = self.card.labels[best], logits.softmax(-1)[best].item()
        pieces = zip(encoding.tokens, encoding.sequence_ids, encoding.offsets, strict=True)
        return Prediction(
            text=text,
            label=label,
            probability=probability,
            logits=logits.tolist(),
            tokens=[Token(piece, number, start, end) for piece, number, (start, end) in pieces],
            kept=kept[:, : len(encoding)].tolist(),
            read=read[: len(encoding)].tolist(),
            truncated=bool(encoding.overflowing),
        )


def load(
    model_dir: str | Path, threads: int | None = None, precision: Precision = "fp32", device: str = "cpu"
) -> TextClassifier:
    """Load a model directory, the `model/` of a finished run, for prediction; nothing else is read.

    `threads` sets the number of CPU threads that torch uses in this process. `precision="bf16"` multiplies in bfloat16,
    up to twice as fast on CPUs that can; answers then differ a little, by how much is said by `tokprune_exp.bench`.

    `device` is where torch computes, for instance cuda.

    Raises:
        UserError: there is no model there, or no such precision.
    """
    if precision not in DTYPES:
        raise UserError(f"precision={precision}: {' or '.join(DTYPES)}")
    if threads is not None:
        if threads < 1:
            raise UserError(f"threads={threads} must be at least 1")
        torch.set_num_threads(threads)
    model, card = load_model(Path(model_dir))
    return TextClassifier(model, card, load_tokenizer(model_dir), precision, device)
