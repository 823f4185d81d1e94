"""Training on several devices, here two CPU processes: one record, equal weights on both."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokprune_exp.data.batches import share_of
from tokprune_exp.errors import UserError

CHECKOUT = Path(__file__).resolve().parent.parent

# The command line, which besides keeps what every process has after each stage. Lightning starts it again for rank 1.
WATCHED = """
    import json, os
    from pathlib import Path
    import tokprune_exp.run
    from safetensors.torch import save_file
    from tokprune_exp.__main__ import main

    run_stage = tokprune_exp.run.run_stage

    def watched(stage, *rest, **settings):
        run_stage(stage, *rest, **settings)
        name = f"{os.environ['NAME']}-{stage.name}-{os.environ.get('LOCAL_RANK', 0)}"
        save_file({key: value.contiguous() for key, value in stage.module.state_dict().items()}, f"{name}.safetensors")
        steps = stage.module._trainer.global_step if stage.module._trainer else 0
        Path(f"{name}.json").write_text(json.dumps(steps))

    tokprune_exp.run.run_stage = watched
    main()
"""


@pytest.mark.parametrize(("batches", "devices", "each"), [(6, 2, 3), (7, 2, 3), (8, 3, 2), (3, 3, 1), (5, 1, 5)])
def test_every_device_has_as_many_batches_and_none_is_trained_on_twice(batches, devices, each):
    drawn = [torch.tensor([number]) for number in range(batches)]
    shares = [[int(batch) for batch in share_of(drawn, rank, devices)] for rank in range(devices)]
    assert [len(share) for share in shares] == [each] * devices
    together = sorted(number for share in shares for number in share)
    assert together == list(range(each * devices))  # the batches come in random order, so the last ones are any
    assert [share[0] for share in shares] == list(range(devices))


def test_fewer_batches_than_devices_are_refused():
    with pytest.raises(UserError, match=r"trainer\.devices=3, but training has 2 batches only"):
        share_of([torch.tensor([0])] * 2, 0, 3)


@pytest.fixture
def command(tiny_root, tiny_tokenizer_directory, tmp_path):
    """Run the command line on the tiny task and wait; returns what it has left and said."""
    (tmp_path / "watched.py").write_text(textwrap.dedent(WATCHED))
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}

    def called(name: str, *overrides: str) -> tuple[dict, Path, str]:
        directory = tmp_path / name
        fixed = [
            *("task=sst2", "task.name=tiny", "task.directory=tiny", "backbone=tiny", "optimizer.lr=1e-3"),
            *(f"backbone.path={tiny_tokenizer_directory}", f"data.root={tiny_root}", f"run_dir={directory}"),
            *("data.batch_size=10", "data.selection_examples=20", "measure.latency_batch_sizes=[1]"),
            *("measure.latency_examples=4", "measure.latency_rounds=1", "logger=csv", "trainer.accelerator=cpu"),
            *("trainer.enable_progress_bar=false", "trainer.precision=32-true", f"data.cache={tmp_path / 'cache'}"),
        ]
        done = subprocess.run(
            [sys.executable, "watched.py", *overrides, *fixed],
            env={**environment, "NAME": name},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((directory / "result.json").read_text()), directory, done.stdout + done.stderr

    return called


def after_each_stage(place: Path, name: str, rank: int) -> dict[str, tuple[int, dict[str, torch.Tensor]]]:
    """Steps and weights of every stage of a run, as the process of this rank has them."""
    files = sorted(place.glob(f"{name}-*-{rank}.json"))
    return {
        file.stem.split("-")[1]: (json.loads(file.read_text()), load_file(file.with_suffix(".safetensors")))
        for file in files
    }


def test_two_devices_do_what_one_does_with_twice_the_batch(command, tmp_path):
    asked = ["+method=finetune", "method.epochs=1", "backbone.dropout=0.0"]
    one, alone, _ = command("one", *asked, "trainer.accumulate_grad_batches=2")
    two, beside, told = command("two", *asked, "trainer.devices=2", "+trainer.strategy=ddp")
    assert one["status"] == two["status"] == "completed"
    assert one["metrics"] == two["metrics"]
    ours, theirs = (load_file(directory / "model" / "model.safetensors") for directory in (beside, alone))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)
    (steps,) = {after_each_stage(tmp_path, name, 0)["finetune"][0] for name in ("one", "two")}
    assert steps == 11  # 220 examples: 22 batches of 10
    assert told.count("run directory") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stages"),
    [
        (["+method=adtp", "budget=0.5"], ["student", "teacher"]),
        (["+method=sttabt", "budget=0.6", "method.epochs=0"], ["approx", "hard", "soft", "teacher"]),
    ],
    ids=["adtp", "sttabt"],
)
def test_every_process_has_the_same_weights_after_every_stage_and_one_of_them_records(
    method, stages, command, tmp_path
):
    result, directory, _ = command("run", *method, "epochs=1", "trainer.devices=2", f"shared_dir={tmp_path / 'shared'}")
    assert result["status"] == "completed" and result["metrics"]["pruned"]
    assert sorted(result["wall_seconds"]["stages"]) == stages
    first, second = (after_each_stage(tmp_path, "run", rank) for rank in (0, 1))
    assert sorted(first) == sorted(second) == stages
    for stage in stages:
        assert first[stage][0] == second[stage][0]
        torch.testing.assert_close(first[stage][1], second[stage][1], rtol=0, atol=0)
    assert len(list((directory / "csv").iterdir())) == 1
    assert not list((directory / "checkpoints").rglob("*.ckpt"))
    assert len(list((tmp_path / "shared" / "teachers").glob("*.safetensors"))) == 1
