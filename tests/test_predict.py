"""The command line that classifies: texts from three places, three forms of answers, one sentence for a mistake."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from model_directories import save_random_model

from tokprune_exp.predict import main, marked
from tokprune_exp.serving import load

CHECKOUT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
LINES = ["the plot is not very good", "dull", "a film and it was long but fine"]


@pytest.fixture(scope="module")
def directory(random_classifier, tiny_tokenizer, tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("single"), random_classifier, tiny_tokenizer)


@pytest.fixture(scope="module")
def pair_directory(random_classifier, tiny_tokenizer, tmp_path_factory):
    made = tmp_path_factory.mktemp("pair")
    return save_random_model(made, random_classifier, tiny_tokenizer, labels=(), pair=True, task="stsb")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process; returns its exit code, the lines of its output and those of its errors."""

    def called(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return called


def process(*arguments, **options):
    called = [sys.executable, "-W", "error", "-m", "tokprune_exp.predict", *map(str, arguments)]
    return subprocess.run(called, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8", **options)


def test_lines_of_standard_input_are_answered_in_order_and_readable_without_colour(directory, tmp_path):
    done = process(directory, input="\n".join([*LINES, "", ""]), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    answers, texts = done.stdout.splitlines()[::2], done.stdout.splitlines()[1::2]
    assert [text.strip().replace("[", "").replace("]", "") for text in texts] == LINES
    assert answers == [str(prediction) for prediction in load(directory).predict(LINES)]
    assert answers[0].endswith(" · tokens kept 8 4 4 4 of 8")
    assert "[" in texts[0]


def test_lines_of_a_file_become_lines_of_json(directory, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\r\n".join(LINES) + "\n", encoding="utf-8")
    done = process(directory, "--file", file, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for answer, prediction in zip(answers, load(directory).predict(LINES), strict=True):
        assert answer["text"] == prediction.text
        assert answer["label"] == prediction.label
        assert answer["probability"] == pytest.approx(prediction.probability)
        assert answer["kept"] == prediction.kept
        assert answer["tokens_kept"] == prediction.tokens_kept
        assert [token["piece"] for token in answer["tokens"]] == [token.piece for token in prediction.tokens]


def test_a_mistake_in_a_process_is_one_sentence_and_exit_code_2(tmp_path):
    done = process(tmp_path, "good", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"no model in {tmp_path}: looked for config.json")
    assert len(done.stderr.splitlines()) == 1


def test_nothing_heavy_is_imported_before_the_texts_are_read():
    heavy = ("torch", "lightning", "transformers", "datasets", "numpy")
    program = f"import sys, tokprune_exp.predict; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_texts_of_the_command_line_come_before_standard_input(command, directory):
    code, out, _ = command(directory, "good film", "dull plot", stdin="never read")
    assert code == 0
    assert len(out) == 4


@pytest.mark.parametrize(("options", "has_colour"), [([], True), (["--plain"], False)])
def test_a_terminal_gets_grey_unless_it_asks_for_plain(command, directory, monkeypatch, options, has_colour):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, (_, text), _ = command(directory, LINES[0], *options)
    assert ("\x1b[90m" in text) == has_colour
    assert ("[" in text.replace("\x1b[", "")) != has_colour


def test_dropped_stretches_are_grey_or_in_brackets():
    stretches = [("it", True), ("'s un", False), ("believ", True), ("able", False)]
    assert marked(stretches, in_colour=False).plain == "it['s un]believ[able]"
    grey = marked(stretches, in_colour=True)
    assert grey.plain == "it's unbelievable"
    assert [grey.plain[span.start : span.end] for span in grey.spans if span.style] == ["'s un", "able"]


def test_pairs_are_two_texts_with_a_tab_between_them(command, pair_directory):
    code, (answer, first, second), _ = command(pair_directory, stdin="good film\tthe plot\n")
    assert code == 0
    assert answer.startswith("score ")
    assert [line.strip().replace("[", "").replace("]", "") for line in (first, second)] == ["good film", "the plot"]


def test_a_line_without_a_tab_is_no_pair(command, pair_directory):
    code, out, err = command(pair_directory, "a\tb", "good film")
    assert (code, out) == (2, [])
    assert err == ["text 2 has 0 tabs, but this model reads pairs: two texts, a tab between them"]


def test_texts_that_cannot_be_read_are_one_sentence(command, directory, tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "latin").write_bytes("déjà".encode("latin-1"))
    for name, sentence in [
        ("absent", "cannot be read: No such file or directory"),
        ("empty", "holds no text: one text a line is needed"),
        ("latin", "is not a text in UTF-8 (byte 1)"),
    ]:
        assert command(directory, "--file", tmp_path / name) == (2, [], [f"{tmp_path / name} {sentence}"])
    assert command(directory) == (2, [], ["standard input holds no text: one text a line is needed"])
