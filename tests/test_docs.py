"""What README, the experiments and the sweeps tell people to type is accepted by the configuration."""

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
    *sorted((CHECKOUT / "conf" / "experiment").glob("*.yaml")),
    *sorted((CHECKOUT / "multirun_sweeps" / "sweep").glob("*.yaml")),
]
COMMAND = re.compile(r"python -m tokprune_exp ([^`#\n]*)")


def commands():
    """Every run or sweep that a document names, as the overrides of its first job."""
    for document in DOCUMENTS:
        for match in COMMAND.finditer(document.read_text(encoding="utf-8")):
            words = [word for word in shlex.split(match[1]) if word not in ("-m", "--cfg", "job") and "(" not in word]
            firsts = [word.partition(",")[0] if "=[" not in word else word for word in words]
            yield pytest.param(firsts, id=f"{document.stem}: {' '.join(words)}")


@pytest.mark.parametrize("overrides", list(commands()))
def test_a_documented_command_composes(overrides, tmp_path):
    placed = [word.replace("=DIR", f"={tmp_path}").replace("=MODEL_DIR", f"={tmp_path}") for word in overrides]
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        check_config(compose("config", placed))


def test_the_documents_name_commands_at_all():
    assert len(list(commands())) >= 12


def test_every_file_that_readme_points_to_exists():
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)#:]+)\)|`((?:docs|tests|conf|multirun_sweeps|pruning|methods)/[\w./]+\.\w+)`", readme)
    assert named
    for link, code in named:
        path = link or code
        assert (CHECKOUT / path).exists() or (CHECKOUT / "tokprune_exp" / path).exists() or "NAME" in path, path
