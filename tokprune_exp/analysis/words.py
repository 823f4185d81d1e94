"""Words of a text and the pieces that a tokenizer cut it into, brought together by their characters."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """A word: characters `start` to `end` of its text, and what a tagger says of it.

    `pos` is the universal part of speech, '' where the pipeline has no tagger; `entity` the kind of named entity that
    it belongs to, or ''. Markup such as `<br />` is one word with pos X and the tag of `MARKUP`.
    """

    text: str
    start: int
    end: int
    pos: str = ""
    tag: str = ""
    lemma: str = ""
    stop: bool = False
    entity: str = ""
    number: bool = False
    punctuation: bool = False


MARKUP = "HTML"
"""The tag of a word that is markup."""
NO_WORD = -1


def words_of_pieces(spans: Sequence[tuple[int, int]], words: Sequence[Word]) -> list[int]:
    """Find for each piece, given by its characters, the index of the word that it shares most characters with.

    Of equal shares the first word counts. A piece that lies in no word (whitespace alone) gets `NO_WORD`. Both pieces
    and words must be in the order of the text.
    """
    found, first = [], 0
    for start, end in spans:
        while first < len(words) and words[first].end <= start:
            first += 1
        best, most = NO_WORD, 0
        for index in range(first, len(words)):
            if words[index].start >= end:
                break
            shared = min(end, words[index].end) - max(start, words[index].start)
            if shared > most:
                best, most = index, shared
        found.append(best)
    return found


def without_space(text: str, start: int, end: int) -> tuple[int, int]:
    """Draw a piece's characters in by the whitespace at both ends, which byte-level tokenizers count to the word."""
    inside = text[start:end]
    if not inside.strip():
        return start, end
    return start + len(inside) - len(inside.lstrip()), end - (len(inside) - len(inside.rstrip()))
