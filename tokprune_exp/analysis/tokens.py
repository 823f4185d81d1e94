"""The long table: a row per piece of every example, what became of it in the model and what it is in the language.

`examples.parquet` has a row per example. Both are written in parts, so that a large split needs little memory.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Encoding, Tokenizer

from tokprune_exp.analysis.passes import Observed, progress
from tokprune_exp.analysis.tagging import Tagger
from tokprune_exp.analysis.texts import AnalysedTexts, parts
from tokprune_exp.analysis.words import NO_WORD, Word, without_space, words_of_pieces
from tokprune_exp.data.tokenise import EncodedSplit, Text
from tokprune_exp.serving import TextClassifier

EXAMPLES_AT_ONCE = 256
NO_SPAN = -1
CONTEXT = 100
"""Characters behind the last token that a model reads, so that the last words are tagged in their context."""
OF_NO_WORD = Word("", NO_SPAN, NO_SPAN)


@dataclass
class Subject:
    """A model, the texts in its own tokens, and what its pruned pass left."""

    classifier: TextClassifier
    split: EncodedSplit
    observed: Observed
    directory: Path


@dataclass(frozen=True)
class Piece:
    """A piece of an example: the text and the word that it belongs to, its characters there; a special one has none."""

    text: int
    index: int
    piece: str
    word: int
    said: Word
    start: int
    end: int
    special: bool


def pieces_of(encoding: Encoding, texts: Sequence[str], words: Sequence[Sequence[Word]]) -> list[Piece]:
    """Bring the pieces of one example together with the words of its text, or of its two.

    A special piece belongs to the text before it, the first one to text 0; it has no word and no characters.
    """
    of_text = encoding.sequence_ids
    spans = [
        (NO_SPAN, NO_SPAN) if text is None else without_space(texts[text], *span)
        for text, span in zip(of_text, encoding.offsets, strict=True)
    ]
    word_of = [NO_WORD] * len(spans)
    for number, its_words in enumerate(words):
        places = [place for place, text in enumerate(of_text) if text == number]
        for place, word in zip(places, words_of_pieces([spans[place] for place in places], its_words), strict=True):
            word_of[place] = word
    pieces, last_text = [], 0
    for place, (text, word) in enumerate(zip(of_text, word_of, strict=True)):
        last_text = last_text if text is None else text
        said = OF_NO_WORD if word == NO_WORD else words[last_text][word]
        pieces.append(Piece(last_text, place, encoding.tokens[place], word, said, *spans[place], text is None))
    return pieces


def write_tables(subjects: Sequence[Subject], texts: AnalysedTexts, tagger: Tagger, terms: Iterable[str]) -> None:
    """Tag every text once and write `tokens.parquet` and `examples.parquet` of each model into its directory.

    Of a long text no more is tagged than a model reads, and a little behind it.
    """
    known, backends = frozenset(terms), [subject.classifier.backend for subject in subjects]
    with ExitStack() as open_files, progress(len(texts.texts), "words") as bar:
        writers = [open_files.enter_context(TableWriter(subject, texts, known)) for subject in subjects]
        for start in range(0, len(texts.texts), EXAMPLES_AT_ONCE):
            some = texts.texts[start : start + EXAMPLES_AT_ONCE]
            tagged = tagger.tag(part for read in parts_read(backends, some) for part in read)
            words = [[next(tagged) for _ in parts(text)] for text in some]
            for writer in writers:
                writer.write(start, words)
            bar.update(len(some))


def parts_read(backends: Sequence[Tokenizer], texts: Sequence[Text]) -> Iterator[list[str]]:
    """Cut each text, or the two of a pair, behind the last token that any of the models reads."""
    encodings = [backend.encode_batch(texts) for backend in backends]
    for text, *of_text in zip(texts, *encodings, strict=True):
        cut = []
        for number, part in enumerate(parts(text)):
            ends = [
                end
                for encoding in of_text
                for sequence, (_, end) in zip(encoding.sequence_ids, encoding.offsets, strict=True)
                if sequence == number
            ]
            space = part.find(" ", max(ends, default=0) + CONTEXT)
            cut.append(part if space < 0 else part[:space])
        yield cut


class TableWriter:
    """Writes the two tables of one model, some examples at a time."""

    def __init__(self, subject: Subject, texts: AnalysedTexts, terms: frozenset[str]) -> None:
        self.subject, self.texts, self.terms = subject, texts, terms
        self.labels = subject.classifier.card.labels
        answer = pa.int64() if self.labels else pa.float64()
        layers = subject.observed.importance.shape[1]
        subject.directory.mkdir(parents=True, exist_ok=True)
        self.tokens = pq.ParquetWriter(subject.directory / "tokens.parquet", tokens_schema(answer))
        self.examples = pq.ParquetWriter(subject.directory / "examples.parquet", examples_schema(answer))
        self.layers = layers

    def __enter__(self) -> "TableWriter":
        """The files are open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the files."""
        self.tokens.close()
        self.examples.close()

    def write(self, start: int, words: Sequence[Sequence[Sequence[Word]]]) -> None:
        """Write the examples from number `start` on, whose words are given: per example, per text."""
        stop = start + len(words)
        backend = self.subject.classifier.backend
        encodings = backend.encode_batch(self.texts.texts[start:stop])
        examples = [self._example(number, encodings[number - start]) for number in range(start, stop)]
        rows = [
            {**about_piece(piece, self.terms), **self._shared(example)}
            for example, encoding, its_words in zip(examples, encodings, words, strict=True)
            for piece in pieces_of(encoding, example["texts"], its_words)
        ]
        self.examples.write_table(pa.Table.from_pylist(examples, self.examples.schema))
        first, last = (int(self.subject.split.offsets[number]) for number in (start, stop))
        observed, schema = self.subject.observed, self.tokens.schema
        columns = {
            "survived": pa.array(observed.survived[first:last]),
            "kept_last_read": pa.array(observed.read[first:last]),
            "importance": as_lists(observed.importance[first:last]),
        }
        for field in schema:
            if field.name not in columns:
                columns[field.name] = pa.array([row[field.name] for row in rows], type=field.type)
        self.tokens.write_table(pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema))

    def _example(self, number: int, encoding: Encoding) -> dict[str, Any]:
        logits, label = self.subject.observed.logits[number], self.texts.labels[number].item()
        example = {
            "example": self.texts.rows[number],
            "texts": list(parts(self.texts.texts[number])),
            "label": label,
            "tokens_kept": self.subject.observed.tokens_kept[number].tolist(),
            "length": len(encoding),
            "truncated": bool(encoding.overflowing),
        }
        if not self.labels:
            return {**example, "predicted": logits[0].item(), "correct": None, "probability": math.nan}
        predicted = int(logits.argmax())
        probability = logits.softmax(-1)[predicted].item()
        return {**example, "predicted": predicted, "correct": predicted == label, "probability": probability}

    def _shared(self, example: dict[str, Any]) -> dict[str, Any]:
        names = ("example", "label", "predicted", "correct", "probability", "length", "truncated")
        return {"n_layers": self.layers, **{name: example[name] for name in names}}


def about_piece(piece: Piece, terms: frozenset[str]) -> dict[str, Any]:
    """Return the columns that say what a piece is."""
    word = piece.said
    return {
        "text": piece.text,
        "piece": piece.index,
        "piece_text": piece.piece,
        "word": piece.word,
        "word_text": word.text,
        "start": piece.start,
        "end": piece.end,
        "pos": word.pos,
        "tag": word.tag,
        "lemma": word.lemma,
        "stop": word.stop,
        "entity": word.entity,
        "number": word.number,
        "punctuation": word.punctuation,
        "domain_term": word.text.lower() in terms,
        "special": piece.special,
    }


def tokens_schema(answer: pa.DataType) -> pa.Schema:
    """Name the columns of `tokens.parquet`; `answer` is the type of labels: class indices, or scores.

    `example` is the row of the split, `word` the index of the word in its text (-1: a special token, or whitespace
    alone), `start` and `end` are the characters of the piece in its text (-1: special), `importance` has a value per
    layer, see `Observed`.
    """
    return pa.schema(
        {
            "example": pa.int64(),
            "text": pa.int64(),
            "piece": pa.int64(),
            "piece_text": pa.string(),
            "word": pa.int64(),
            "word_text": pa.string(),
            "start": pa.int64(),
            "end": pa.int64(),
            "n_layers": pa.int64(),
            "survived": pa.int16(),
            "kept_last_read": pa.bool_(),
            "importance": pa.list_(pa.float32()),
            "pos": pa.string(),
            "tag": pa.string(),
            "lemma": pa.string(),
            "stop": pa.bool_(),
            "entity": pa.string(),
            "number": pa.bool_(),
            "punctuation": pa.bool_(),
            "domain_term": pa.bool_(),
            "special": pa.bool_(),
            **answers_schema(answer),
        }
    )


def examples_schema(answer: pa.DataType) -> pa.Schema:
    """Name the columns of `examples.parquet`; `tokens_kept` has the tokens that leave each layer, special ones too."""
    return pa.schema(
        {
            "example": pa.int64(),
            "texts": pa.list_(pa.string()),
            "tokens_kept": pa.list_(pa.int64()),
            **answers_schema(answer),
        }
    )


def answers_schema(answer: pa.DataType) -> dict[str, pa.DataType]:
    """Name the columns that both tables have: `correct` is null and `probability` NaN in a regression."""
    return {
        "label": answer,
        "predicted": answer,
        "correct": pa.bool_(),
        "probability": pa.float64(),
        "length": pa.int64(),
        "truncated": pa.bool_(),
    }


def as_lists(values: np.ndarray) -> pa.Array:
    """Make a column of lists from the rows of a matrix."""
    rows, width = values.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1) * width, type=pa.int32()), pa.array(values.ravel()))


def read_columns(file: Path, columns: Sequence[str]) -> pa.Table:
    """Read some columns of a table; strings become dictionaries, which take little memory."""
    schema = pq.read_schema(file)
    text = [name for name in columns if schema.field(name).type == pa.string()]
    return pq.read_table(file, columns=list(columns), read_dictionary=text)
