"""Sweeps: a process for each job, none takes another with it, what is missing is said and made up for."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tokprune_exp import sweep
from tokprune_exp.__main__ import main
from tokprune_exp.config import config_directory, teacher_hash
from tokprune_exp.sweep import (
    Jobs,
    how_it_ended,
    in_quotes,
    objectives,
    one_of,
    planned_jobs,
    share_of_the_machine,
    with_values,
)

CHECKOUT = Path(__file__).resolve().parent.parent

# What a job does here in place of training: it completes, fails or is killed, by its seed, until it was `mended`.
STAND_IN = """
    import json, os, signal, sys
    from pathlib import Path
    from tokprune_exp.config import config_hash
    from hydra import compose, initialize_config_dir
    from tokprune_exp.config import config_directory

    *overrides, run_dir, shared_dir, mode = sys.argv[1:]
    assert mode == "hydra.mode=RUN" and shared_dir.startswith("shared_dir='")
    directory = Path(run_dir.removeprefix("run_dir='").removesuffix("'"))
    seed = next(int(one.removeprefix("seed=")) for one in overrides if one.startswith("seed="))
    mended = Path("mended").exists()
    with open("started", "a") as file:
        file.write(f"{seed} {os.environ['OMP_NUM_THREADS']}\\n")
    if seed == 3 and not mended:
        directory.mkdir(parents=True)
        (directory / "result.json").write_text(json.dumps({"status": "failed", "reason": "UserError: no data"}))
        sys.exit(2)
    if seed == 7 and not mended:
        os.kill(os.getpid(), signal.SIGKILL)
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        digits = config_hash(compose("config", overrides))
    directory.mkdir(parents=True, exist_ok=True)
    found = {"status": "completed", "config_hash": digits, "metrics": {"pruned": {"accuracy": seed / 100}}}
    (directory / "result.json").write_text(json.dumps({**found, "flops": {"reduction_unpadded": 2.0}}))
"""


@pytest.fixture
def command(monkeypatch, tmp_path, capfd):
    """Run the command line in this process, in an empty directory, with jobs that train nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "job.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setattr(sweep, "COMMAND", [sys.executable, str(tmp_path / "job.py")])
    monkeypatch.setattr(Jobs, "started_in", None)

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["tokprune_exp", *arguments])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, capfd.readouterr()

    return called


def started(directory: Path) -> list[int]:
    lines = (directory / "started").read_text().splitlines()
    (directory / "started").unlink()
    return [int(line.split()[0]) for line in lines]


def test_of_twelve_jobs_one_fails_and_one_is_killed_and_only_these_are_run_again(command, tmp_path):
    seeds = ",".join(map(str, range(12)))
    asked = ["-m", "+method=ltp", f"seed={seeds}", "hydra.sweep.dir=found"]
    code, told = command(*asked)
    assert code == 2
    assert started(tmp_path) == list(range(12))
    results = [json.loads(file.read_text()) for file in (tmp_path / "found").glob("*/result.json")]
    assert sum(result["status"] == "completed" for result in results) == 10
    assert (
        "10 of 12 jobs are complete. Missing: job 4 (failed: UserError: no data); job 8 (killed by SIGKILL)."
        in told.out
    )
    assert "job 12 of 12 (+method=ltp seed=11)" in told.out
    assert "The same command, started again, runs only these." in told.out
    (line,) = (line for line in told.out.splitlines() if "seed=9" in line and "50.0%" in line)
    assert line.split()[:4] == ["10", "seed=9", "0.0900", "50.0%"]

    (tmp_path / "mended").touch()
    code, told = command(*asked)
    assert code == 0
    assert started(tmp_path) == [3, 7]
    assert "job 1 of 12 (+method=ltp seed=0): complete already" in told.out
    assert "Missing" not in told.out
    assert len(list((tmp_path / "found").glob("*/result.json"))) == 12


def test_a_sweep_file_runs_its_jobs_below_its_own_folder(command, tmp_path):
    code, _ = command("+sweep=adtp_retainers")
    assert code == 0
    assert started(tmp_path) == [0, 1, 2] * 3
    plan = json.loads((tmp_path / "multirun/adtp_retainers/sweep.json").read_text())
    assert plan["jobs"][0] == ["retainer=static", "seed=0", "+sweep=adtp_retainers"]
    assert len(list((tmp_path / "multirun/adtp_retainers").glob("adtp-sst2-*/result.json"))) == 9


@pytest.mark.parametrize(
    ("arguments", "jobs"),
    [
        (["+sweep=frontier", "budget=0.3,0.6", "contender=ltp"], [["ltp", "0.3"], ["ltp", "0.6"]]),
        (["contender=ltp,adtp", "+sweep=frontier", "budget=0.3"], [["ltp", "0.3"], ["adtp", "0.3"]]),
        (["contender=ltp", "+sweep=frontier", "budget=0.3"], [["ltp", "0.3"]]),
    ],
)
def test_values_beside_a_sweep_file_take_the_place_of_its_own(command, tmp_path, arguments, jobs):
    code, _ = command(*arguments, "seed=5")
    assert code == 0
    plan = json.loads((tmp_path / "multirun/frontier/sweep.json").read_text())
    expected = [
        {f"contender={contender}", f"budget={budget}", "+sweep=frontier", "seed=5"} for contender, budget in jobs
    ]
    assert [set(job) for job in plan["jobs"]] == expected
    assert [len(job) for job in plan["jobs"]] == [4] * len(jobs)
    assert started(tmp_path) == [5] * len(jobs)


def test_a_setting_that_only_the_one_choice_beside_a_sweep_file_has_is_taken(command, tmp_path):
    code, _ = command("+sweep=frontier", "contender=sttabt", "budget=0.3,0.6", "method.approx_epochs=2", "seed=5")
    assert code == 0
    assert started(tmp_path) == [5, 5]
    code, told = command("+sweep=frontier", "contender=ltp", "budget=0.3,0.6", "method.approx_epochs=2", "seed=5")
    assert code == 2
    assert "method.approx_epochs: method has no key approx_epochs" in told.err


def test_a_value_that_cannot_be_read_beside_a_sweep_file_is_one_line(command, tmp_path):
    code, told = command("+sweep=frontier", "budget=[0.3")
    assert code == 2 and not (tmp_path / "started").exists()
    assert "[0.3" in told.err and len(told.err.strip().splitlines()) == 1


@pytest.mark.parametrize("one_job", [["hydra.mode=RUN"], ["--cfg", "job"], ["-c", "job"]])
def test_where_one_job_is_run_or_shown_its_values_stay_as_they_are(one_job):
    arguments = ["+sweep=frontier", "contender=adtp", *one_job]
    assert with_values(arguments) == arguments != with_values(arguments[:2])


def test_a_setting_below_a_group_is_replaced_as_well_and_what_the_file_does_not_vary_is_added(command, tmp_path):
    code, _ = command("+sweep=adtp_alpha", "loss.alpha=0.1,0.9", "seed=4")
    assert code == 0
    plan = json.loads((tmp_path / "multirun/adtp_alpha/sweep.json").read_text())
    assert plan["jobs"] == [[f"loss.alpha={alpha}", "+sweep=adtp_alpha", "seed=4"] for alpha in ("0.1", "0.9")]
    assert started(tmp_path) == [4, 4]


def test_a_mistake_in_one_job_is_said_before_anything_starts_and_the_others_run(command, tmp_path):
    code, told = command("-m", "+method=ltp", "retainer.temperature=0.001,hot", "seed=0", "hydra.sweep.dir=found")
    assert code == 2
    assert "job 2 (+method=ltp,retainer.temperature=hot,seed=0): retainer.temperature=hot: must be float" in told.err
    assert started(tmp_path) == [0]
    assert "1 of 2 jobs are complete. Missing: job 2 (not started)." in told.out


def test_a_job_that_is_alone_on_the_machine_has_all_cores(command, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command("-m", "+method=ltp", "seed=0", "hydra.sweep.dir=found")
    assert (tmp_path / "started").read_text() == f"0 {len(os.sched_getaffinity(0))}\n"


@pytest.mark.parametrize(
    ("kind", "cores", "expected"),
    [
        ({"_target_": "a.BasicLauncher"}, 8, (1, 8)),
        ({"_target_": "a.JoblibLauncher", "n_jobs": -1}, 8, (8, 1)),
        ({"_target_": "a.JoblibLauncher", "n_jobs": 3}, 8, (3, 2)),
        ({"_target_": "a.JoblibLauncher", "n_jobs": 50}, 8, (8, 1)),
        ({"_target_": "a.LocalLauncher", "array_parallelism": 256}, 2, (2, 1)),
        ({"_target_": "a.SlurmLauncher", "cpus_per_task": 5}, 2, (None, 5)),
    ],
)
def test_jobs_times_threads_never_exceed_the_cores(monkeypatch, kind, cores, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    at_once, threads = share_of_the_machine(OmegaConf.create(kind))
    assert (at_once, threads) == expected
    assert at_once is None or at_once * threads <= cores


@pytest.mark.parametrize(("asked", "threads"), [("1", 1), ("3", 3), ("64", 8), ("0", 8), ("", 8), ("4,2", 8)])
def test_a_job_takes_no_more_threads_than_the_environment_says(monkeypatch, asked, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert share_of_the_machine(OmegaConf.create({"_target_": "x.BasicLauncher"})) == (1, threads)


def test_no_more_jobs_at_once_than_places(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "POLL_S", 0.01)
    inside, most, lock = 0, 0, threading.Lock()

    def work():
        nonlocal inside, most
        with one_of(2, tmp_path):
            with lock:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.05)
            with lock:
                inside -= 1

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == 2


def test_a_search_has_no_list_of_jobs_beforehand():
    config = OmegaConf.create(
        {"hydra": {"sweeper": {"_target_": "hydra_plugins.x.OptunaSweeper", "params": {"a": "1"}}}}
    )
    assert planned_jobs(config) == []


@pytest.mark.parametrize("name", ["plain", "with space", "it's", "a,b=c", "[x]"])
def test_a_folder_of_any_name_reaches_the_job(name, tmp_path):
    place = tmp_path / name
    asked = [
        sys.executable,
        "-m",
        "tokprune_exp",
        "+method=finetune",
        f"run_dir={in_quotes(str(place))}",
        "--cfg",
        "job",
    ]
    done = subprocess.run(asked, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True)
    assert OmegaConf.create(done.stdout).run_dir == str(place)


def test_how_a_job_ended_in_words(tmp_path):
    job = {"directory": str(tmp_path), "code": -signal.SIGSEGV}
    assert how_it_ended(job) == "killed by SIGSEGV"
    assert how_it_ended({**job, "code": None}) == "stopped with the sweep"
    assert how_it_ended({**job, "code": 1}) == "failed: see above"
    (tmp_path / "result.json").write_text('{"reason": "first line\\nsecond"}')
    assert how_it_ended({**job, "code": 1}) == "failed: first line"
    (tmp_path / "result.json").write_text("{")
    assert how_it_ended({**job, "code": 1}) == "failed: see above"
    assert objectives(tmp_path) is None


@pytest.fixture(scope="module")
def sweeps_of_tiny_runs(tiny_root, tiny_tokenizer_directory, tmp_path_factory):
    """Run two seeds of LTP for real, launched in several ways; returns the metrics by folder of each."""
    data = tmp_path_factory.mktemp("root")
    (data / "glue_sst2").symlink_to(tiny_root / "tiny")

    def launched(*launcher: str) -> dict[str, dict[str, float]]:
        directory = tmp_path_factory.mktemp("sweep")
        asked = ["-m", "+method=ltp", "backbone=tiny", "trainer=smoke", "logger=none", "seed=0,1", *launcher]
        asked += [f"backbone.path={tiny_tokenizer_directory}", f"data.root={data}", "hydra.sweep.dir=found"]
        done = subprocess.run(
            [sys.executable, "-m", "tokprune_exp", *asked],
            env={**os.environ, "PYTHONPATH": str(CHECKOUT), "TOKPRUNE_CACHE": str(directory / "cache")},
            cwd=directory,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        assert "Missing" not in done.stdout
        assert len(list((directory / "found/shared/teachers").glob("*.safetensors"))) == 2  # one for each seed
        files = (directory / "found").glob("*/result.json")
        return {file.parent.name: json.loads(file.read_text())["metrics"] for file in files}

    return launched


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "launcher"),
    [
        ("hydra_plugins.hydra_joblib_launcher", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
        ("hydra_plugins.hydra_submitit_launcher", ["hydra/launcher=submitit_local"]),
    ],
)
def test_jobs_side_by_side_find_what_jobs_in_a_row_find(plugin, launcher, sweeps_of_tiny_runs):
    pytest.importorskip(plugin)
    side_by_side = sweeps_of_tiny_runs(*launcher)
    assert len(side_by_side) == 2
    assert side_by_side == sweeps_of_tiny_runs()


def test_jobs_with_the_same_teacher_name_the_same_file():
    def digits(*overrides: str) -> str:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            return teacher_hash(compose("config", ["+method=ltp", *overrides]))

    assert digits("budget=0.3") == digits("budget=0.5", "loss.lam=1.0", "method.epochs=7", "run_dir=x")
    for other in (
        "seed=1",
        "task=rte",
        "optimizer.lr=1e-6",
        "teacher.epochs=9",
        "data.batch_size=8",
        "backbone.layers=2",
    ):
        assert digits(other) != digits()
