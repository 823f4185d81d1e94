"""An installed wheel brings its configuration and its sweeps along."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory):
    """The package as pip would install it, away from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder), str(CHECKOUT)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if built.returncode:
        pytest.skip(
            f"the wheel could not be built here, hatchling may be out of reach: {built.stderr.splitlines()[-1]}"
        )
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder / "installed")
    return folder / "installed"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["+method=adtp", "task=rte"], "tokprune_exp.methods.adtp.ADTP"),
        (["+sweep=adtp_retainers", "hydra.mode=RUN"], "tokprune_exp.methods.adtp.ADTP"),
    ],
)
def test_the_wheel_composes_runs_and_sweeps_from_any_directory(unpacked_wheel, tmp_path, arguments, expected):
    called = subprocess.run(
        [sys.executable, "-m", "tokprune_exp", "--cfg", "job", *arguments],
        env={"PYTHONPATH": str(unpacked_wheel), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert called.returncode == 0, called.stderr
    assert f"_target_: {expected}" in called.stdout
