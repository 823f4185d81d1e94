"""Words with part of speech, entity and flags, from spaCy, always of the original text with its case and stop words."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokprune_exp.analysis.words import MARKUP, Word
from tokprune_exp.data.assets import ASSETS, asset_directory
from tokprune_exp.errors import DataUnavailableError, UserError

DEFAULT_PIPELINE = "en_core_web_md"
UNUSED = ["parser", "senter"]
"""Parts of a pipeline that say nothing of single words and take time."""
TEXTS_AT_ONCE = 64
ELEMENT = re.compile(r"</?[a-z][a-z0-9]*\s*/?>", re.IGNORECASE)
"""Markup without attributes: <br />, <p>, </i>."""


class Tagger:
    """A spaCy pipeline by name or path; `name` and `version` say which one it is.

    Raises:
        UserError: spaCy or the pipeline is not there; the message says how to get it.
    """

    def __init__(self, pipeline: str, cache: str | Path) -> None:
        self.pipeline = load_pipeline(pipeline, cache)
        self.name = f"{self.pipeline.meta['lang']}_{self.pipeline.meta['name']}"
        self.version = str(self.pipeline.meta["version"])

    def tag(self, texts: Iterable[str]) -> Iterator[list[Word]]:
        """Yield the words of each text, in order; what is only whitespace is no word.

        Markup is taken out beforehand and put back as words of its own: spaCy reads `movie.<br` as one word. Every
        other character keeps its place.
        """
        pairs = ((without_markup(text), text) for text in texts)
        for doc, text in self.pipeline.pipe(pairs, as_tuples=True, batch_size=TEXTS_AT_ONCE):
            words = [
                Word(
                    text=token.text,
                    start=token.idx,
                    end=token.idx + len(token.text),
                    pos=token.pos_,
                    tag=token.tag_,
                    lemma=token.lemma_,
                    stop=token.is_stop,
                    entity=token.ent_type_,
                    number=token.like_num,
                    punctuation=token.is_punct,
                )
                for token in doc
                if not token.is_space
            ]
            elements = [
                Word(found.group(), *found.span(), pos="X", tag=MARKUP, lemma=found.group())
                for found in ELEMENT.finditer(text)
            ]
            yield sorted([*words, *elements], key=lambda word: word.start) if elements else words

    def forms(self, texts: Iterable[str]) -> Iterator[list[str]]:
        """Yield the words of each text in lower case and without any tag, which is a hundred times as fast."""
        for text in texts:
            yield [token.lower_ for token in self.pipeline.make_doc(without_markup(text)) if not token.is_space]

    def is_term(self, form: str) -> bool:
        """Whether a word can be a term of a domain: it has a letter and is no stop word."""
        return any(character.isalpha() for character in form) and not self.pipeline.vocab[form].is_stop


def without_markup(text: str) -> str:
    """Put spaces in place of markup, as many as it had characters."""
    return ELEMENT.sub(lambda found: " " * len(found.group()), text)


def load_pipeline(name: str, cache: str | Path) -> Any:
    """Load an installed pipeline, a folder, or the one that comes inside a wheel (see `data/assets.py`).

    Raises:
        UserError: see `Tagger`.
    """
    try:
        import spacy
    except ImportError as error:
        raise UserError(
            "words are tagged with spaCy, which is not installed: pip install 'tokprune_exp[analysis]'"
        ) from error
    place: str | Path = name
    if name in ASSETS and not spacy.util.is_package(name) and not Path(name).is_dir():
        try:
            place = asset_directory(name, cache)
        except DataUnavailableError as error:
            raise UserError(
                f"no spaCy pipeline {name} is installed, and its wheel was not got: {error}; or name another pipeline "
                "with --spacy (an installed one, or the folder of one)"
            ) from error
    try:
        return spacy.load(place, exclude=UNUSED)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--spacy {name}: neither an installed spaCy pipeline nor the folder of one ({_first_line(error)}); "
            f"leave it out for {DEFAULT_PIPELINE}, or get one with `python -m spacy download NAME`"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
