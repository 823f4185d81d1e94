"""Every notebook runs from top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


@pytest.mark.filterwarnings("ignore")  # what Jupyter's own packages say about themselves
@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_the_notebook_runs(notebook, minilm_directory):
    NotebookClient(nbformat.read(notebook, as_version=4), timeout=120, kernel_name="python3").execute()
