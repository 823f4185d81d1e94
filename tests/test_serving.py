"""A loaded model: its answers are those of the model that was saved, in the order of the texts."""

import pytest
import torch
from model_directories import MAX_TOKENS, save_random_model

import tokprune_exp
from tokprune_exp.data.tokenise import encode_texts
from tokprune_exp.errors import UserError
from tokprune_exp.model import load_model
from tokprune_exp.serving import Prediction, Token, load

TEXTS = [
    "the plot is not very good",
    "dull",
    "a film and it was long and dull and not good but fine",
    "",
    "Good Film unheardof",
    "the film is fine but very very very very very long",
]


@pytest.fixture(scope="module")
def directory(random_classifier, tiny_tokenizer, tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("single"), random_classifier, tiny_tokenizer)


@pytest.fixture(scope="module")
def pair_directory(random_classifier, tiny_tokenizer, tmp_path_factory):
    made = tmp_path_factory.mktemp("pair")
    return save_random_model(made, random_classifier, tiny_tokenizer, labels=(), pair=True, task="stsb")


@pytest.fixture(scope="module")
def classifier(directory):
    return load(directory)


@pytest.fixture(scope="module")
def pair_classifier(pair_directory):
    return load(pair_directory)


def test_the_package_offers_load(directory):
    (prediction,) = tokprune_exp.load(str(directory)).predict(["good"])
    assert prediction.text == "good"


def test_logits_are_those_of_the_saved_model_run_masked(classifier, directory, tiny_tokenizer):
    model, _ = load_model(directory)
    batch = encode_texts(tiny_tokenizer, TEXTS, MAX_TOKENS).collate(range(len(TEXTS)))
    with torch.no_grad():
        theirs = model(batch, "masked").logits
    torch.testing.assert_close(classifier.logits(TEXTS, batch_tokens=20), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_answers_come_in_the_order_of_the_texts_whatever_the_batches(classifier, batch_tokens):
    predictions = classifier.predict(TEXTS, batch_tokens)
    assert [prediction.text for prediction in predictions] == TEXTS
    for prediction, text in zip(predictions, TEXTS, strict=True):
        (alone,) = classifier.predict([text])
        assert (prediction.label, prediction.tokens, prediction.kept) == (alone.label, alone.tokens, alone.kept)
        assert prediction.logits == pytest.approx(alone.logits, abs=1e-5)


def test_the_label_is_the_likeliest_class(classifier):
    for prediction in classifier.predict(TEXTS):
        probabilities = torch.tensor(prediction.logits).softmax(0).tolist()
        assert prediction.probability == pytest.approx(max(probabilities))
        assert prediction.label == ["negative", "positive"][probabilities.index(max(probabilities))]


def test_tokens_carry_the_place_of_their_characters(classifier):
    (prediction,) = classifier.predict(["Good Film unheardof"])
    assert prediction.tokens == [
        Token("[CLS]", None, 0, 0),
        Token("good", 0, 0, 4),
        Token("film", 0, 5, 9),
        Token("[UNK]", 0, 10, 19),
        Token("[SEP]", None, 0, 0),
    ]


def test_kept_says_per_layer_what_went_on(classifier):
    (prediction,) = classifier.predict(["the plot is not very good"])
    everything, *later = prediction.kept
    assert all(everything)
    assert len(prediction.tokens) == 8
    assert prediction.tokens_kept == [8, 4, 4, 4]  # [CLS] and ⌈0.4 · 7⌉
    assert all(layer == later[0] for layer in later)
    assert later[0][0]


def test_a_long_text_is_truncated_and_that_is_said(classifier):
    long, short = classifier.predict(["good " * 100, "good"])
    assert (long.truncated, len(long.tokens)) == (True, MAX_TOKENS)
    assert (short.truncated, len(short.tokens)) == (False, 3)
    assert str(long).endswith(f"of {MAX_TOKENS} · truncated")


def test_of_a_pair_each_token_knows_its_text(pair_classifier):
    (prediction,) = pair_classifier.predict([("good film", "the plot")])
    assert [token.text for token in prediction.tokens] == [None, 0, 0, None, 1, 1, None]
    assert [token.start for token in prediction.tokens if token.text == 1] == [0, 4]
    assert [len(stretches) > 0 for stretches in prediction.stretches()] == [True, True]


def test_a_regression_answers_with_a_score(pair_classifier):
    pair = ("good film", "the plot")
    (prediction,) = pair_classifier.predict([pair])
    assert (prediction.label, prediction.probability) == (None, None)
    assert prediction.logits == pytest.approx(pair_classifier.logits([pair])[0].tolist())
    assert str(prediction).startswith(f"score {prediction.logits[0]:.3f} · tokens kept 7 4 4 4 of 7")


def test_no_texts_no_answers(classifier):
    assert classifier.predict([]) == []
    assert classifier.logits([]).shape == (0, 2)


def test_stretches_grey_a_part_of_a_word_alone_and_spaces_only_between_dropped_tokens():
    pieces = [("it", 0, 2), ("'", 2, 3), ("s", 3, 4), ("un", 5, 7), ("##believ", 7, 13), ("##able", 13, 17)]
    prediction = Prediction(
        text="it's unbelievable, but truncated",
        label="good",
        probability=1.0,
        logits=[0.0, 9.0],
        tokens=[Token("[CLS]", None, 0, 0), *(Token(piece, 0, start, end) for piece, start, end in pieces)],
        kept=[[True] * 7, [True, True, False, False, False, True, False]],
        read=[True, True, False, False, False, True, False],
        truncated=True,
    )
    assert prediction.stretches() == [[("it", True), ("'s un", False), ("believ", True), ("able", False)]]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ("good film", "a list of texts is needed, not a single string"),
        (["good", ("good", "film")], r"text 1 is a pair, but this model of sst2 reads single texts"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(classifier, texts, sentence):
    with pytest.raises(UserError, match=sentence):
        classifier.predict(texts)
    with pytest.raises(UserError, match=sentence):
        classifier.logits(texts)


def test_a_model_of_pairs_refuses_a_single_text(pair_classifier):
    with pytest.raises(UserError, match=r"text 0 is a single text, but this model of stsb reads pairs: \(text, text\)"):
        pair_classifier.predict(["good"])


def test_numbers_below_one_are_refused(classifier, directory):
    with pytest.raises(UserError, match="batch_tokens=0 must be at least 1"):
        classifier.predict(["good"], batch_tokens=0)
    with pytest.raises(UserError, match="threads=0 must be at least 1"):
        load(directory, threads=0)


def test_threads_are_those_that_torch_uses(directory):
    before = torch.get_num_threads()
    try:
        load(directory, threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no model in .*: looked for config\.json"):
        load(tmp_path)
