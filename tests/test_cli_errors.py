"""The command line answers a mistake with one clear line and exit code 2."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from tokprune_exp.__main__ import main
from tokprune_exp.config import choices
from tokprune_exp.errors import UserError

METHODS = " | ".join(f"+method={name}" for name in choices("method"))


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Run the command line in this process, in an empty directory, with `run` in place of the real one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def called(*arguments, run=lambda cfg, directory: None):
        monkeypatch.setitem(sys.modules, "tokprune_exp.run", SimpleNamespace(run=run))
        monkeypatch.setattr(sys, "argv", ["tokprune_exp", *arguments])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err.splitlines()

    return called


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ("", [f"no method is chosen; choose one: {METHODS}"]),
        ("+metod=adtp", ["metod: there is no such group; did you mean +method=adtp?"]),
        ("method=adtp", ["method is added, not replaced: write +method=adtp | finetune"]),
        ("sweep=nope", ["sweep is added, not replaced: write +sweep=adtp_alpha | adtp_beta"]),
        ("+method=adtp +task=rte", ["task is chosen already; to replace it, write task=NAME without +"]),
        ("+method=nope", ["method=nope: there is no such method; available: adtp, finetune"]),
        (
            "+method=adtp +method=finetune",
            ["method is chosen already; to replace it, write method=NAME without +"],
        ),
        (
            "+experiment=demo +method=adtp",
            ["scorer is chosen by two methods; to replace the one of an"],
        ),
        ("+method=adtp,finetune", ["+method=adtp,finetune: several values make a sweep; add -m"]),
        ("+method=adtp task=nope", ["task=nope: there is no such task; available: 20newsgroups, ag_news, "]),
        ("+method=adtp tsk=rte", ["tsk: the configuration has no key tsk; did you mean task?"]),
        ("+method=adtp optimizer.lrr=1", ["optimizer.lrr: optimizer has no key lrr; did you mean lr?"]),
        (
            "+method=adtp data.batch_size=big",
            ["data.batch_size: Value 'big' of type 'str' could not be converted to Int"],
        ),
        ("+method=adtp retainer.ratio=big", ["retainer.ratio=big: must be float"]),
        ("+method=adtp task", ["task: cannot be read; write key=value, group=option or +method=NAME"]),
        ("+method=finetune scorer=random", ["finetune takes no scorer"]),
        ("scorer=random", [f"scorer is chosen, but no method that takes one; choose one: {METHODS}"]),
        ("+sweep=nope", ["sweep=nope: there is no such sweep; available: adtp_alpha, adtp_beta"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command, arguments, lines):
    code, told = command(*arguments.split())
    assert code == 2
    assert len(told) == len(lines)
    assert all(line.startswith(start) for line, start in zip(told, lines, strict=True))


def test_a_process_that_is_told_nonsense_prints_no_traceback_and_leaves_nothing_behind(tmp_path):
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "PATH": ""}
    called = [sys.executable, "-m", "tokprune_exp", "+method=adtp", "+retainer.ration=0.2"]
    done = subprocess.run(called, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "retainer.ration: AdaptiveRatio has no such argument; did you mean ratio?\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_given_its_configuration_and_an_absolute_folder(command, tmp_path):
    seen = []
    code, told = command("+method=adtp", "seed=4", run=lambda cfg, directory: seen.append((cfg.seed, directory)))
    assert (code, told) == (0, [])
    ((seed, directory),) = seen
    assert (seed, directory.parent) == (4, tmp_path / "outputs")
    assert list(tmp_path.iterdir()) == []


def test_what_the_user_can_mend_is_said_in_its_own_words(command):
    def run(cfg, directory):
        raise UserError("the data is not there; get it by make data")

    assert command("+method=adtp", run=run) == (2, ["the data is not there; get it by make data"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_as_what_it_is(command, tmp_path, error):
    def run(cfg, directory):
        raise error

    code, (told,) = command("+method=adtp", f"run_dir={tmp_path / 'mine'}", run=run)
    assert code == 2
    assert told.startswith("the disk is full; ")
    assert told.endswith(f" goes on from {tmp_path / 'mine'}")


def test_anything_else_that_fails_shows_where_and_ends_with_1(command):
    def run(cfg, directory):
        raise FloatingPointError("loss/distillation is not a number")

    code, told = command("+method=adtp", run=run)
    assert code == 1
    assert told[0] == "Traceback (most recent call last):"
    assert told[-1] == "failed: loss/distillation is not a number"
