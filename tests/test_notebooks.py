"""Every notebook runs from top to bottom, and is stored without what came out."""

import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tokprune_exp.data.assets import asset_directory
from tokprune_exp.errors import DataUnavailableError

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
READS_REVIEWS, TAGS_WORDS = ("1_", "2_", "3_"), ("3_",)


def notebooks():
    found = [nbformat.read(file, as_version=4) for file in sorted(NOTEBOOKS.glob("*.ipynb"))]
    names = [file.stem for file in sorted(NOTEBOOKS.glob("*.ipynb"))]
    return [pytest.param(name, notebook, id=name) for name, notebook in zip(names, found, strict=True)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what Jupyter's own packages say about themselves
@pytest.mark.parametrize(("name", "notebook"), notebooks())
def test_the_notebook_runs(name, notebook, minilm_directory, asset_cache, request):
    if name.startswith(READS_REVIEWS):
        request.getfixturevalue("rotten_tomatoes_directory")
    if name.startswith(TAGS_WORDS):
        needs_a_tagger(asset_cache)
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute()


def needs_a_tagger(cache):
    if importlib.util.find_spec("spacy") is None:
        pytest.skip("words are tagged with spaCy, which is not installed: pip install 'tokprune_exp[analysis]'")
    if importlib.util.find_spec("en_core_web_md") is None:
        try:
            asset_directory("en_core_web_md", cache)
        except DataUnavailableError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize(("name", "notebook"), notebooks())
def test_the_notebook_is_stored_without_outputs_and_begins_with_a_title(name, notebook):
    first, *others = notebook.cells
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    for cell in others:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
