"""The configuration: every file composes and is accepted, every mistake is found, every run has its own folder."""

import ast
import importlib
import inspect
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tokprune_exp.config import check_config, choices, config_directory, config_hash, run_directory
from tokprune_exp.errors import ConfigError
from tokprune_exp.targets import constructor, mismatch, nearest

CONF = config_directory()
SWEEPS = CONF.parent / "multirun_sweeps" / "sweep"
ADDED = ("method", "experiment")
"""Groups that bring a method; options of all others are tried with adtp."""
REFUSED = {
    "retainer/keep_all": [],
    "retainer/learned_threshold": [],
    "retainer/manual_threshold": [],
    "retainer/topk": [],
    "loss/ltp": [],
    "loss/sttabt": [],
    "retainer/backtracking": [],
    "retainer/concrete": [],
    "scorer/approx_attention": [],
    "scorer/exact_attention": [],
    "teacher/none": ["loss.alpha=0"],
}
"""Options that adtp refuses, and what makes it accept them, where anything does."""


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def problems(*overrides):
    try:
        check_config(composed(*overrides))
    except ConfigError as error:
        return error.problems
    return []


def options():
    return sorted(str(file.relative_to(CONF).with_suffix("")) for file in CONF.glob("*/*.yaml"))


def chosen(option):
    group, name = option.split("/")
    if group == "text":
        return ["+method=sttabt", f"+text={name}"]
    if group == "hparams_search":
        return ["+method=ltp", f"+hparams_search={name}"]
    return [f"+{group}={name}"] if group in ADDED else ["+method=adtp", f"{group}={name}"]


def test_what_comes_from_a_hub_is_pinned_to_a_commit():
    pinned = {}
    for option in options():
        group, read = option.split("/")[0], OmegaConf.load(CONF / f"{option}.yaml")
        source = read.get("hub") if group in ("task", "text") else read if group == "backbone" else None
        if source and (group != "backbone" or source.get("hub")):
            pinned[option] = re.fullmatch("[0-9a-f]{40}", source.get("revision") or "")
    assert {"task/sst2", "text/wikitext2", "backbone/bert_base"} <= set(pinned)
    assert [option for option, revision in pinned.items() if revision is None] == []


def test_no_configuration_file_is_left_out():
    assert len(options()) + 1 == len(list(CONF.rglob("*"))) - len([path for path in CONF.iterdir() if path.is_dir()])
    # beside sweep/ lie the groups whose files a sweep chooses from, see tests/test_sweep_files.py
    assert len(list(SWEEPS.parent.glob("*/*.yaml"))) == len(list(SWEEPS.parent.rglob("*.yaml")))


@pytest.mark.parametrize("option", options())
def test_every_option_of_every_group_is_accepted(option):
    found = problems(*chosen(option))
    if option in REFUSED:
        assert found
        found = problems(*chosen(option), *REFUSED[option]) if REFUSED[option] else []
    assert found == []


@pytest.mark.parametrize("method", choices("method"))
@pytest.mark.parametrize("task", choices("task"))
def test_every_method_takes_every_task(method, task):
    assert problems(f"+method={method}", f"task={task}") == []


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_can_be_tried_in_seconds(experiment):
    cfg = composed(f"+experiment={experiment}", "trainer=smoke")
    assert (cfg.epochs, cfg.data.max_train_examples, cfg.data.max_evaluation_examples) == (1, 32, 32)


@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_job_of_every_sweep_is_accepted_and_has_its_own_folder(file):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = compose("config", [f"+sweep={file.stem}"], return_hydra_config=True).hydra
    assert hydra.mode.name == "MULTIRUN"
    assert hydra.sweep.dir == f"multirun/{file.stem}"
    varied = [[f"{key}={value}" for value in str(values).split(",")] for key, values in hydra.sweeper.params.items()]
    jobs = [[f"+sweep={file.stem}", *job] for job in itertools.product(*varied)]
    assert f"# Jobs:     {len(jobs)}\n" in file.read_text(encoding="utf-8")
    configurations = [composed(*job) for job in jobs]
    for cfg in configurations:
        check_config(cfg)
    assert len({run_directory(cfg, Path("root")) for cfg in configurations}) == len(jobs)


@pytest.mark.parametrize("option", [one for one in options() if one.startswith(("scorer/", "retainer/", "loss/"))])
def test_a_part_that_is_built_in_python_has_the_values_of_its_file(option):
    node = OmegaConf.load(CONF / f"{option}.yaml")
    module, _, name = node._target_.rpartition(".")
    defaults = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    given = {key: value for key, value in node.items() if not str(key).startswith("_")}
    assert given == {key: defaults[key].default for key in given}


def test_the_smoke_trainer_is_still_a_trainer():
    smoke, default = composed("+method=finetune", "trainer=smoke"), composed("+method=finetune")
    assert smoke.trainer == default.trainer
    assert smoke.epochs == 1 and default.epochs is None


def test_a_teacher_of_another_kind_keeps_nothing_of_the_students_backbone():
    cfg = composed("+method=adtp", "teacher=gte_small", "backbone.wheel=minilm_l6")
    assert (cfg.teacher.backbone.name, cfg.teacher.backbone.wheel) == ("gte_small", None)
    assert composed("+method=adtp", "backbone=tiny").teacher.backbone.name == "tiny"


def test_all_problems_are_told_at_once():
    found = problems("+method=adtp", "+sed=1", "loss.alpha=high", "scorer.activation=gelu", "retainer=keep_all")
    assert found == [
        "sed: the configuration has no key sed; did you mean seed?",
        "scorer.activation=gelu: must be softplus, relu or none",
        "loss.alpha=high: must be float",
        "adtp prunes with retainer=adaptive or nucleus or min_p or static or random",
    ]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([], "no method is chosen; choose one: +method="),
        (["+method=adtp", "+data.batchsize=3"], "data.batchsize: data has no key batchsize; did you mean batch_size?"),
        (
            ["+method=adtp", "+retainer.ration=0.2"],
            "retainer.ration: AdaptiveRatio has no such argument; did you mean ratio?",
        ),
        (["+method=adtp", "start_from=DIR"], "a model starts from its teacher or from start_from"),
        (
            ["+method=adtp", "retainer=topk"],
            "adtp prunes with retainer=adaptive or nucleus or min_p or static or random",
        ),
        (["+method=ltp", "retainer=static"], "ltp prunes with retainer=learned_threshold"),
        (["+method=ltp", "loss=adtp"], "ltp has a loss of its own: loss=ltp"),
        (["+method=manual_topk", "+loss=ltp"], "manual_topk takes no loss"),
        (["+method=finetune", "budget=0.5"], "finetune takes no budget"),
        (["+method=adtp", "compile=true"], "adtp cannot be compiled: its loss needs second derivatives"),
        (["+method=adtp", "retainer.candidates=2.5"], "retainer.candidates=2.5: must be int"),
        (["+method=adtp", "method.attribution.top_k=all"], "method.attribution.top_k=all: must be int or null"),
        (["+method=adtp", "retainer.keeps_separators=1"], "retainer.keeps_separators=1: must be bool"),
        (
            ["+method=adtp", "scorer._target_=os.system"],
            "scorer._target_: os.system is not allowed; here a target starts with tokprune_exp.pruning.scorers.",
        ),
        (["+method=adtp", "method.attribution._target_=builtins.eval"], "builtins.eval is not allowed"),
        (["+method=adtp", "scorer._target_=tokprune_exp.pruning.scorers.Nope"], "cannot be found: there is no Nope in"),
        (
            ["+method=adtp", "scorer._target_=tokprune_exp.pruning.scorers.nope.Scorer"],
            "cannot be found: there is no module tokprune_exp.pruning.scorers.nope",
        ),
        (["+method=adtp", "scorer._target_=tokprune_exp.head.Head"], "tokprune_exp.head.Head is not allowed"),
        (["+method=adtp", "+trainer.max_epochs=1"], "trainer.max_epochs: the run sets this itself; epochs are set by"),
        (["+method=adtp", "+retainer.dim=5"], "retainer.dim: the run sets this itself"),
        (["+method=adtp", "epochs=0"], "epochs=0: must be at least 1"),
        (["+method=adtp", "measure.latency_batch_sizes=[0]"], "measure.latency_batch_sizes=[0]: must be at least 1"),
        (
            ["+method=adtp", "data.train_shorter_than=1.0"],
            "data.train_shorter_than=1.0: must be a quantile above 0 and below 1 (0.5: the median)",
        ),
        (["+method=adtp", "data.train_shorter_than=0"], "data.train_shorter_than=0.0: must be a quantile"),
        (["+method=adtp", "data.train_shorter_than=-0.5"], "data.train_shorter_than=-0.5: must be a quantile"),
        (["+method=adtp", "data.train_shorter_than=nan"], "data.train_shorter_than=nan: must be a quantile"),
        (["+method=adtp", "trainer.precision=fp16"], "trainer.precision=fp16: choose from auto, "),
        (["+method=ltp", "trainer.precision=16-mixed"], "set optimizer.fused=false, or trainer.precision=bf16-mixed"),
        (["+method=adtp", "trainer.devices=0"], "trainer.devices=0: must be the number of devices, 1 or more"),
        (["+method=adtp", "trainer.devices=auto"], "trainer.devices=auto: must be the number of devices"),
        (["+method=adtp", "+trainer.strategy=fsdp"], "trainer.strategy=fsdp: several devices train by ddp"),
        (
            ["+method=adtp", "loss.budget_weight=1.0", "retainer=static"],
            "loss.budget_weight holds the ratio of an adaptive retainer",
        ),
        (["+method=adtp", "method.loss=${los}"], "method.loss: Interpolation key 'los' not found"),
        (["+method=adtp", "task.name=???"], "task.name: a value is needed"),
        (["+method=finetune", "+scorer=random"], "finetune takes no scorer"),
        (["+method=adtp", "method.ratio_target=gumbel"], "set loss.budget_weight and loss.gamma above 0"),
        (
            ["+method=adtp", "method.ratio_target=oracle", "retainer=static"],
            "only an adaptive retainer learns its ratio",
        ),
        (["+method=adtp", "teacher=none"], "set loss.alpha=0"),
        (["+method=adtp", "teacher=none", "loss.alpha=0", "loss.kappa_max=0.5"], "set loss.kappa_max=1"),
        (
            ["+method=adtp", "teacher=gte_small", "teacher.initialises_student=true"],
            "set teacher.initialises_student=false",
        ),
        (["+method=adtp", "data.source=floppy"], "data.source is one of directory, hub, wheel"),
        (["+method=adtp", "data.source=directory", "data.root=null"], "set data.root=DIR"),
        (["+method=adtp", "data.source=hub", "task=rotten_tomatoes"], "this task is not on the hub"),
        (
            ["+method=adtp", "backbone.hub=null", "backbone.wheel=null", "backbone.weights_root=null"],
            "no place to read from",
        ),
    ],
)
def test_a_mistake_is_answered_by_one_line_that_names_it(overrides, problem):
    found = problems(*overrides)
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    "override", ["optimizer.fused=false", "trainer.gradient_clip_val=null", "trainer.accelerator=cpu"]
)
def test_16_mixed_is_accepted_where_gradients_are_unscaled_in_time_or_not_clipped_or_not_scaled(override):
    assert problems("+method=ltp", "trainer.precision=16-mixed", override) == []


def test_the_folder_changes_with_the_result_and_with_nothing_else():
    def name(*overrides):
        return config_hash(composed("+method=adtp", *overrides))

    assert name() == name()
    assert name() == name("run_dir=x", "overwrite=true", "logger=wandb", "tags=[a]", "data.cache=c")
    assert len({name(), name("seed=1"), name("optimizer.lr=1e-4"), name("retainer.ratio=0.5"), name("epochs=1")}) == 5


def test_training_on_short_texts_is_another_run_and_no_mistake():
    short = ["+method=adtp", "data.train_shorter_than=0.5"]
    assert problems(*short) == []
    hashes = {config_hash(composed(*arguments)) for arguments in (short, short[:1], [*short[:1], f"{short[1]}1"])}
    assert len(hashes) == 3


def test_the_sweep_over_lengths_varies_nothing_but_the_method_and_the_seed():
    ltp, manual = (composed("+sweep=ltp_lengths", f"contender={one}") for one in ("ltp_gated", "manual_threshold"))
    assert (ltp.method._target_, manual.method._target_) == (
        "tokprune_exp.methods.ltp.LTP",
        "tokprune_exp.methods.manual_threshold.ManualThreshold",
    )
    assert (ltp.retainer.relaxation, ltp.loss.budget_weight) == ("gated", 100)
    assert (manual.retainer._target_.rpartition(".")[2], manual.loss) == ("ManualThreshold", None)
    for cfg in (ltp, manual):
        assert (cfg.budget, cfg.data.train_shorter_than, cfg.teacher.path) == (0.55, 0.5, None)
    assert ltp.data == manual.data


def test_the_folder_is_named_after_the_run_or_as_the_user_says():
    cfg = composed("+method=adtp", "task=sst2", "seed=3")
    assert run_directory(cfg, Path("outputs")) == Path(f"outputs/adtp-sst2-minilm_l6-seed3-{config_hash(cfg)}")
    assert run_directory(composed("+method=adtp", "run_dir=here"), Path("outputs")) == Path("here")


@pytest.mark.parametrize("target", ["torch.optim.AdamW", "torch.optim.SGD", "lightning.pytorch.Trainer"])
def test_a_constructor_read_from_its_source_is_the_one_that_is_called(target):
    import lightning.pytorch  # noqa: F401
    import torch  # noqa: F401

    module, _, name = target.rpartition(".")
    theirs = inspect.signature(getattr(sys.modules[module], name)).parameters.values()
    ours = constructor(target).parameters
    assert [one.name for one in ours] == [one.name for one in theirs]
    assert [one.required for one in ours] == [one.default is inspect.Parameter.empty for one in theirs]


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        ("int", [1, -1], [1.0, True, "1", None]),
        ("float", [1, 0.5], ["0.5", True, None]),
        ("bool", [True], [1, "true"]),
        ("int | None", [1, None], ["all"]),
        ("Optional[str]", ["x", None], [1]),
        ("Literal['a', 'b']", ["a"], ["c", None]),
        ("list[int]", [[], [1, 2]], [[1, "2"], 1]),
        ("Union[float, Tensor]", [1.0], ["fast"]),
        ("SomeAlias | None", [1, None, "anything"], []),
        ("Callable[..., int]", [1, "anything"], []),
    ],
)
def test_a_plain_value_is_compared_with_what_the_annotation_allows(annotation, right, wrong):
    expression = ast.parse(annotation, mode="eval").body
    assert [mismatch(value, expression) for value in right] == [[] for _ in right]
    assert all(mismatch(value, expression) for value in wrong)


def test_the_nearest_word_is_near_or_none():
    assert nearest("metod", ["method", "task"]) == "method"
    assert nearest("zzz", ["method", "task"]) is None


def test_the_configuration_is_found_in_an_installed_package_and_from_any_directory(tmp_path):
    installed = tmp_path / "site" / "tokprune_exp"
    shutil.copytree(CONF.parent / "tokprune_exp", installed, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CONF, installed / "conf")
    shutil.copytree(SWEEPS.parent, installed / "multirun_sweeps")
    done = subprocess.run(
        [sys.executable, "-m", "tokprune_exp", "--cfg", "job", "+sweep=adtp_retainers"],
        env={"PYTHONPATH": str(installed.parent), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert OmegaConf.create(done.stdout).method._target_ == "tokprune_exp.methods.adtp.ADTP"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site"]


def test_a_teacher_counts_by_its_weights_and_not_by_its_place(tmp_path):
    for place, weights in (("here", b"1"), ("there", b"1"), ("other", b"2")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "model.safetensors").write_bytes(weights)
    here, there, other = (
        config_hash(composed("+method=adtp", f"teacher.path={tmp_path / place}"))
        for place in ("here", "there", "other")
    )
    assert here == there != other
