"""C++ of this folder, compiled on first use with the machine's own compiler and kept in the cache.

It is built once on each kind of machine (about two seconds). Without a compiler, or with TOKPRUNE_KERNELS=0, there is
no library, the plain loops are used, and nothing else changes.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path

FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
"""Never -ffast-math: it would undo the rounding by which the attention computes its exponential."""
HEADERS = Path(__file__).parent


def compiled(source: Path) -> ctypes.CDLL | None:
    """Build or find the library of a source; None where there is no compiler or kernels are switched off."""
    if os.environ.get("TOKPRUNE_KERNELS") == "0":
        return None
    try:
        return ctypes.CDLL(str(_built(source)))
    except (OSError, subprocess.SubprocessError):
        return None


def _built(source: Path) -> Path:
    """Return the library for this source, compiler and kind of CPU; built on first use, whole or not at all.

    Raises:
        OSError: there is no compiler, or the cache cannot be written.
        CalledProcessError: the compiler gave up.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    headers = b"".join(header.read_bytes() for header in sorted(HEADERS.glob("*.h")))
    key = sha256(source.read_bytes() + headers + _macros(compiler) + " ".join(FLAGS).encode()).hexdigest()[:20]
    directory = Path(os.environ.get("TOKPRUNE_CACHE", "~/.cache/tokprune_exp")).expanduser() / "kernels"
    library = directory / f"{source.stem}-{key}.so"
    if not library.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            made = Path(folder) / library.name
            command = [compiler, *FLAGS, f"-I{HEADERS}", str(source), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            made.replace(library)
    return library


@cache
def _macros(compiler: str) -> bytes:
    """Return what names the compiler and the instruction sets of this CPU."""
    asked = [compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(asked, check=True, capture_output=True, timeout=60).stdout
