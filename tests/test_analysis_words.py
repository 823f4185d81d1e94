"""Pieces find their words by their characters, for every tokenizer and kind of text; tags are of the whole text."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from tokprune_exp.analysis.tagging import Tagger, without_markup
from tokprune_exp.analysis.tokens import CONTEXT, parts_read, pieces_of
from tokprune_exp.analysis.words import MARKUP, NO_WORD, Word, without_space, words_of_pieces
from tokprune_exp.errors import UserError

spacy = pytest.importorskip("spacy")

TEXTS = [
    "  two spaces before, one film after",
    'A "very" good movie.<br /><br />I don\'t  regret it!',
    "naïve café, 3,000 of AT&T's $5 — “quoted” and ﬁne\n\nbye",
    "so good 😀😀 👩‍👩‍👧 film🎬!",
    "unbelievablylongwordthatissurelycutintopieces film",
    "日本語の映画 is good",
    "",
    " \n ",
]
PAIR = [("a film 😀", "the  plot<br />is dull")]


def wordpiece():
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(
        TEXTS[:3], trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]", "[CLS]", "[SEP]"])
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return backend


def byte_level(trim_offsets=True):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(
        TEXTS[:3],
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets, False)
    return backend


TOKENIZERS = {"bert": wordpiece(), "roberta": byte_level(), "roberta untrimmed": byte_level(trim_offsets=False)}


@pytest.fixture(scope="session")
def tagger(tmp_path_factory):
    return Tagger(str(blank_pipeline(tmp_path_factory.mktemp("pipeline"))), "nowhere")


def blank_pipeline(folder):
    """English without a model: tokens, stop words, numbers and punctuation, and a rule that knows two nouns."""
    pipeline = spacy.blank("en")
    ruler = pipeline.add_pipe("attribute_ruler")
    for noun in ("film", "plot"):
        ruler.add([[{"LOWER": noun}]], {"POS": "NOUN", "TAG": "NN", "LEMMA": noun})
    pipeline.to_disk(folder)
    return folder


def most_shared(span, words):
    """The word that shares most characters with a span, by looking at each character of each word."""
    shared = [len(set(range(*span)) & set(range(word.start, word.end))) for word in words]
    return shared.index(max(shared)) if shared and max(shared) else NO_WORD


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", [*TEXTS, *PAIR])
def test_every_piece_belongs_to_the_word_it_shares_most_characters_with(name, text, tagger):
    texts = [text] if isinstance(text, str) else list(text)
    words = list(tagger.tag(texts))
    encoding = TOKENIZERS[name].encode(*texts)
    pieces = pieces_of(encoding, texts, words)

    assert [piece.index for piece in pieces] == list(range(len(encoding)))
    assert sum(piece.special for piece in pieces) == sum(one is None for one in encoding.sequence_ids) >= 2
    for piece in pieces:
        if piece.special:
            assert (piece.word, piece.start, piece.end, piece.said.text) == (NO_WORD, -1, -1, "")
            continue
        shown = texts[piece.text][piece.start : piece.end]
        assert shown == shown.strip() or not shown.strip()
        its_words = words[piece.text]
        assert piece.word == most_shared((piece.start, piece.end), its_words)
        assert (piece.word == NO_WORD) == (not shown.strip())
        if piece.word != NO_WORD:
            assert piece.said is its_words[piece.word]
            assert set(shown) & set(piece.said.text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_word_of_a_text_that_is_not_cut_has_a_piece(name, tagger):
    for text, words in zip(TEXTS, tagger.tag(TEXTS), strict=True):
        pieces = pieces_of(TOKENIZERS[name].encode(text), [text], [words])
        # an emoji's joiner alone is a character that BERT's normaliser throws away
        missing = set(range(len(words))) - {piece.word for piece in pieces}
        assert all(not any(one.isalnum() for one in words[index].text) for index in missing)


def test_an_emoji_that_bytes_cut_in_parts_is_one_word(tagger):
    (words,) = tagger.tag(["good 😀"])
    pieces = pieces_of(TOKENIZERS["roberta"].encode("good 😀"), ["good 😀"], [words])
    faces = [piece for piece in pieces if piece.said.text == "😀"]
    assert len(faces) > 1
    assert {(piece.word, piece.start, piece.end) for piece in faces} == {(1, 5, 6)}


WORDS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=8)
"""Gaps before words or pieces, and their lengths."""


def laid_out(gaps_and_lengths):
    spans, place = [], 0
    for gap, length in gaps_and_lengths:
        spans.append((place + gap, place + gap + length))
        place += gap + length
    return spans


@given(words=WORDS, pieces=WORDS)
@settings(max_examples=200, deadline=None)
def test_the_fast_alignment_equals_the_one_by_characters(words, pieces):
    words = [Word("x" * (end - start), start, end) for start, end in laid_out(words)]
    spans = laid_out(pieces)
    assert words_of_pieces(spans, words) == [most_shared(span, words) for span in spans]


def test_whitespace_at_the_ends_of_a_piece_is_drawn_in():
    assert without_space("a  good film", 1, 7) == (3, 7)
    assert without_space("good \n", 0, 6) == (0, 4)
    assert without_space("a   b", 1, 4) == (1, 4)  # nothing but space: as it was
    assert without_space("ab", 1, 1) == (1, 1)


def test_markup_is_a_word_of_its_own_and_moves_nothing(tagger):
    text = "Good movie.<br /><br />I loved <i>it</i> 1 < 2"
    (words,) = tagger.tag([text])
    assert all(text[word.start : word.end] == word.text for word in words)
    assert [word.text for word in words if word.tag == MARKUP] == ["<br />", "<br />", "<i>", "</i>"]
    assert all(word.pos == "X" for word in words if word.tag == MARKUP)
    assert {"movie", "I", "it", "<"} <= {word.text for word in words if word.tag != MARKUP}
    assert len(without_markup(text)) == len(text)


def test_words_carry_what_the_pipeline_says(tagger):
    (words,) = tagger.tag(["The film is 3 , not"])
    said = {word.text: word for word in words}
    assert said["film"].pos == "NOUN" and said["film"].lemma == "film" and not said["film"].stop
    assert said["The"].stop and said["not"].stop and said["3"].number and said[","].punctuation
    assert [said["The"].pos, said["film"].entity] == ["", ""]


def test_forms_are_small_letters_without_markup(tagger):
    assert list(tagger.forms(["Good<br />Film  !"])) == [["good", "film", "!"]]
    assert [tagger.is_term(form) for form in ("film", "the", "3", "!", "b2b")] == [True, False, False, False, True]


def test_a_pipeline_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="--spacy nonsense: neither an installed spaCy pipeline nor the folder of one"):
        Tagger("nonsense", tmp_path)
    with pytest.raises(UserError, match="neither an installed spaCy pipeline nor the folder of one"):
        Tagger(str(tmp_path), tmp_path)  # a folder that holds nothing


def test_without_spacy_the_sentence_says_what_to_install(tmp_path):
    program = (
        "import sys; sys.modules['spacy'] = None\n"
        "from tokprune_exp.analysis.tagging import Tagger\n"
        "from tokprune_exp.errors import UserError\n"
        "try: Tagger('en_core_web_md', 'x')\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("pip install 'tokprune_exp[analysis]'")


def test_the_real_pipeline_tags_words_in_their_context(asset_cache):
    if not (asset_cache / "assets" / "en_core_web_md").is_dir():
        pytest.skip("the wheel of en_core_web_md was never fetched")
    tagger = Tagger("en_core_web_md", asset_cache)
    assert tagger.name == "en_core_web_md"
    (words,) = tagger.tag(["A good movie.<br />They plot in New York."])
    said = {word.text: word for word in words}
    assert [said[word].pos for word in ("good", "movie", "plot", "York")] == ["ADJ", "NOUN", "VERB", "PROPN"]
    assert said["York"].entity == "GPE" and said["movie"].entity == ""


def test_the_alignment_holds_on_the_real_tokenizer_of_minilm(minilm_directory, tagger):
    backend = Tokenizer.from_file(str(minilm_directory / "tokenizer.json"))
    backend.no_padding()
    for text, words in zip(TEXTS, tagger.tag(TEXTS), strict=True):
        for piece in pieces_of(backend.encode(text), [text], [words]):
            if not piece.special:
                assert piece.word == most_shared((piece.start, piece.end), words) != NO_WORD


def test_a_long_text_is_tagged_as_far_as_the_longest_reader_reads(minilm_directory):
    def reader(tokens: int) -> Tokenizer:
        backend = Tokenizer.from_file(str(minilm_directory / "tokenizer.json"))
        backend.no_padding()
        backend.enable_truncation(tokens)
        return backend

    short, long = "A short one.", " ".join(f"word{number}" for number in range(400))
    read = list(parts_read([reader(16), reader(64)], [short, long, (short, long)]))
    assert read[0] == [short] and read[2][0] == short
    for cut in (read[1][0], read[2][1]):
        assert long.startswith(cut) and long[len(cut)] == " "
    end = max(end for _, end in reader(64).encode(long).offsets)
    assert end + CONTEXT <= len(read[1][0]) <= end + CONTEXT + len("word000")
