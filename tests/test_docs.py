"""What README, docs/, the experiments and the sweeps tell people to type is accepted by the configuration."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from tokprune_exp.config import check_config, config_directory

CHECKOUT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    CHECKOUT / "README.md",
    CHECKOUT / "multirun_sweeps" / "README.md",
    *sorted((CHECKOUT / "docs").glob("*.md")),
    *sorted((CHECKOUT / "conf" / "experiment").glob("*.yaml")),
    *sorted((CHECKOUT / "multirun_sweeps" / "sweep").glob("*.yaml")),
]
COMMAND = re.compile(r"(`)?python\s-m\stokprune_exp\s((?(1)[^`]*|(?:\\\n|[^`#\n])*))")
"""Between backticks a command may be wrapped; else it ends with its line, if that does not end with a backslash."""
PLACEHOLDER = re.compile(r"=(MODEL_DIR|DIR|TASK|BACKBONE)\b")


def commands_of(text):
    """Every run or sweep that a text names, as its overrides."""
    for match in COMMAND.finditer(text):
        words = shlex.split(match[2].replace("\\\n", " "))
        yield [word for word in words if word not in ("-m", "--cfg", "job") and "(" not in word]


def commands():
    """Every run or sweep that a document names, as the overrides of its first job."""
    for document in DOCUMENTS:
        for words in commands_of(document.read_text(encoding="utf-8")):
            firsts = [word.partition(",")[0] if "=[" not in word else word for word in words]
            yield pytest.param(firsts, id=f"{document.stem}: {' '.join(words)}")


@pytest.mark.parametrize("overrides", list(commands()))
def test_a_documented_command_composes(overrides, tmp_path):
    values = {"MODEL_DIR": str(tmp_path), "DIR": str(tmp_path), "TASK": "sst2", "BACKBONE": "gte_small"}
    placed = [PLACEHOLDER.sub(lambda match: f"={values[match[1]]}", word) for word in overrides]
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        check_config(compose("config", placed))


def test_a_command_is_read_to_its_end_however_it_is_wrapped():
    text = """
        python -m tokprune_exp -m +method=ltp seed=0,1 \\
            task=rte  # a comment
        python -m tokprune_exp --cfg job +method=adtp
        plain words, then `python -m tokprune_exp +method=sttabt
        task=TASK teacher.path=MODEL_DIR` (`budget=0.5`), `python -m tokprune_exp.analyze DIR`
    """
    assert list(commands_of(text)) == [
        ["+method=ltp", "seed=0,1", "task=rte"],
        ["+method=adtp"],
        ["+method=sttabt", "task=TASK", "teacher.path=MODEL_DIR"],
    ]


def test_the_documents_name_commands_at_all():
    assert len(list(commands())) >= 60


def test_every_file_that_readme_points_to_exists():
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)#:]+)\)|`((?:docs|tests|conf|multirun_sweeps|pruning|methods)/[\w./]+\.\w+)`", readme)
    assert named
    for link, code in named:
        path = link or code
        assert (CHECKOUT / path).exists() or (CHECKOUT / "tokprune_exp" / path).exists() or "NAME" in path, path
