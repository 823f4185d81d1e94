"""The sweep files: what their headers and their index promise, and that every value in them can be constructed."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tokprune_exp.config import check_config, config_directory, instantiate, sweep_directory
from tokprune_exp.curves.axes import AXES
from tokprune_exp.encoder.encoder import EncoderShape, PrunedEncoder
from tokprune_exp.head import Head
from tokprune_exp.model import PrunedClassifier
from tokprune_exp.pruning.pruning import Pruning

SWEEPS = sorted((sweep_directory() / "sweep").glob("*.yaml"))
PARTS = sorted(path for path in sweep_directory().glob("*/*.yaml") if path.parent.name != "sweep")
INDEX = (sweep_directory() / "README.md").read_text(encoding="utf-8")
HEADER = ["What", "Source", "Command", "Jobs", "Cost", "Expected", "Draw"]
MINILM = EncoderShape(vocabulary=300, dim=384, heads=12, layers=6, ff_dim=1536, positions=512)


@cache
def composed(*overrides, with_hydra=False):
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=with_hydra)


def varied(file: Path) -> dict[str, list[str]]:
    """What a sweep varies: its keys and their values."""
    params = composed(f"+sweep={file.stem}", with_hydra=True).hydra.sweeper.params
    return {key: str(values).split(",") for key, values in params.items()}


def jobs_with_every_value(file: Path) -> list[list[str]]:
    """The first job of a sweep and, for every other value, the job that differs from it by this value alone."""
    keys = varied(file)
    first = {key: values[0] for key, values in keys.items()}
    others = [{**first, key: value} for key, values in keys.items() for value in values[1:]]
    return [[f"+sweep={file.stem}", *(f"{key}={value}" for key, value in job.items())] for job in (first, *others)]


def header(file: Path) -> dict[str, str]:
    """The entries of the comment that a sweep file begins with."""
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    found: dict[str, str] = {}
    for line in lines[1:]:
        if not line.startswith("#"):
            break
        if match := re.match(r"# (\w+): +(\S.*)", line):
            found[match[1]] = match[2]
        else:
            assert line.startswith("#           "), line
            found[list(found)[-1]] += " " + line.removeprefix("#").strip()
    return found


def named(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


@pytest.mark.parametrize("file", SWEEPS, ids=named)
def test_a_header_says_what_from_where_how_and_at_what_cost(file):
    said = header(file)
    assert list(said) == HEADER
    assert f"+sweep={file.stem}" in said["Command"].split()
    drawn = re.findall(r"multirun/(\w+)", said["Draw"])
    assert set(drawn) <= {sweep.stem for sweep in SWEEPS}
    assert file.stem in drawn or "snippet" in said["Draw"]
    along = re.findall(r"--(?:x|by) ([\w.]+)", said["Draw"])
    assert set(along) <= {*varied(file), *(axis.key for axis in AXES)}
    assert max(map(len, file.read_text(encoding="utf-8").splitlines())) <= 120


def test_the_index_has_every_sweep_once_with_its_number_of_jobs():
    rows = re.findall(r"^\|.*\| `(\w+)` \| (\d+) \|", INDEX, re.MULTILINE)
    assert sorted(rows) == sorted((file.stem, header(file)["Jobs"]) for file in SWEEPS)


def test_every_part_is_chosen_by_a_sweep_and_explains_itself():
    chosen = {
        f"{key}/{value}"
        for file in SWEEPS
        for key, values in varied(file).items()
        for value in values
        if (sweep_directory() / key).is_dir()
    }
    assert chosen == set(map(named, PARTS))
    for file in PARTS:
        package, comment = file.read_text(encoding="utf-8").splitlines()[:2]
        assert (package, comment[:2]) == ("# @package _global_", "# ")


@pytest.mark.parametrize("file", SWEEPS, ids=named)
def test_every_value_of_a_sweep_is_accepted_by_what_it_is_given_to(file):
    """Built with MiniLM's sizes and no memory; bounds of values are checked by the constructors only."""
    for job in jobs_with_every_value(file):
        cfg = composed(*job)
        with torch.device("meta"):
            pruning = Pruning(instantiate(cfg.scorer)(MINILM.dim), instantiate(cfg.retainer)(MINILM.dim, MINILM.layers))
            model = PrunedClassifier(PrunedEncoder(MINILM), Head(MINILM.dim, 2), pruning, separator=3)
        budget = {} if cfg.budget is None else {"budget": cfg.budget}
        instantiate(cfg.method)(model=model, metrics=["accuracy"], optimizer=instantiate(cfg.optimizer), **budget)


def test_a_value_out_of_bounds_would_be_found():
    cfg = composed("+sweep=sttabt_approx", "scorer.factor=7")
    check_config(cfg)
    with pytest.raises(ValueError, match=r"scorer\.factor=7"):
        instantiate(cfg.scorer)(MINILM.dim)


def test_the_methods_of_the_frontier_stand_at_the_same_budgets():
    keys = varied(sweep_directory() / "sweep" / "frontier.yaml")
    budgets = [float(value) for value in keys["budget"]]
    assert len(budgets) >= 5 and (budgets[0], budgets[-1]) == (0.15, 0.8) and budgets == sorted(budgets)


@pytest.mark.parametrize("sweep", ["frontier", "ltp_tasks", "ltp_lengths", "ltp_relaxation"])
def test_where_methods_are_compared_all_of_them_train_for_as_long_from_the_same_dense_model(sweep):
    keys = varied(sweep_directory() / "sweep" / f"{sweep}.yaml")
    assert "method" not in keys, "a method without its recipe has epochs of its own"
    parts = set()
    for contender in keys["contender"]:
        cfg = composed(f"+sweep={sweep}", f"contender={contender}")
        has_soft_stage = cfg.retainer._target_.rpartition(".")[2] in ("LearnedThreshold", "Concrete")
        assert cfg.method.epochs + has_soft_stage * cfg.method.get("soft_epochs", 0) == 4, contender
        assert cfg.teacher == composed(f"+sweep={sweep}").teacher
        parts.add((cfg.method._target_, cfg.retainer._target_, cfg.retainer.get("relaxation")))
    assert len(parts) == len(keys["contender"])


@pytest.mark.parametrize(
    ("without", "changed"),
    [
        ("teacher", {"loss.alpha": 0.0, "teacher": None}),
        ("cross_entropy", {"loss.alpha": 1.0}),
        ("logit", {"loss.alpha": 0.0}),
        ("attribution", {"loss.beta": 0.0}),
        ("retainer", {"loss.gamma": 0.0}),
    ],
)
def test_an_ablation_changes_what_it_says_and_nothing_else(without, changed):
    whole, part = (
        OmegaConf.to_container(composed("+sweep=adtp_losses", f"without={one}"), resolve=True)
        for one in ("nothing", without)
    )
    assert whole == OmegaConf.to_container(composed("+method=adtp"), resolve=True)
    expected = OmegaConf.create(whole)
    for key, value in changed.items():
        OmegaConf.update(expected, key, value)
        if key.startswith("loss."):
            OmegaConf.update(expected, f"method.{key}", value)
    assert part == OmegaConf.to_container(expected)


def test_the_snippet_prints_what_is_no_point_of_a_curve(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, kl in ((1, 0.3), (2, 0.2)):
        folder = tmp_path / "multirun" / "sttabt_approx" / f"run{number}"
        folder.mkdir(parents=True)
        overrides = [f"scorer.factor={number}", "+sweep=sttabt_approx", "run_dir='x'", "shared_dir='y'"]
        found = {"approximation": {"distilled": {"kl": kl}}}
        (folder / "result.json").write_text(json.dumps({"overrides": overrides, "findings": found}))
    (code,) = re.findall(r"```python\n(.*?)```", INDEX, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        "scorer.factor=1 +sweep=sttabt_approx {'distilled': {'kl': 0.3}}",
        "scorer.factor=2 +sweep=sttabt_approx {'distilled': {'kl': 0.2}}",
    ]
