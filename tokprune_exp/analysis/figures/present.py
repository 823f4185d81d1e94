"""Everything that shows an analysis: the figures of each model, one page of all of them, and a W&B run."""

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tokprune_exp.analysis.page import SENTENCES, read_models, write_page
from tokprune_exp.errors import UserError

COMPARED = "compare"
"""The folder of an analysis that holds those of the models that it was compared with."""


def present(
    directory: Path, wandb: str = "offline", sentences: int = SENTENCES, say: Callable[[str], object] = print
) -> list[Path]:
    """Write `figures/*.png` of every model, `page.html` and, unless `wandb` is none, a W&B run; returns their paths.

    What is left out is said by `say`.

    Raises:
        UserError: the directory holds no analysis, or W&B starts no run.
    """
    models = models_of(directory)
    written: list[Path] = []
    if importlib.util.find_spec("matplotlib") is None:
        say("figures left out: the package matplotlib is not installed: pip install 'tokprune_exp[analysis]'")
    else:
        from tokprune_exp.analysis.figures.draw import draw_all

        for model, folder in models.items():
            written += draw_all(folder, partial(say_of, model, say))
    about = json.loads((directory / "about.json").read_text("utf-8"))
    rows = read_models(models, sentences)
    page = directory / "page.html"
    shown = len(rows[0].examples)
    note = (
        f"{shown} of the {about['examples']:,} texts of the {about['split']} split that were analysed. A third of them "
        "are such that some model answered wrongly, where there were as many."
    )
    write_page(page, rows, f"What was kept: {about['task']}", note)
    written.append(page)
    if wandb != "none":
        from tokprune_exp.analysis.figures.wandb_run import log_to_wandb  # Lightning: seconds

        figures = [file for file in written if file.parent == directory / "figures"]
        run = log_to_wandb(directory, page, figures, offline=wandb == "offline")
        written += [run] if run else []
    return written


def say_of(model: str, say: Callable[[str], object], words: str) -> None:
    """Say something of one of several models."""
    say(f"{model}: {words}")


def models_of(directory: Path) -> dict[str, Path]:
    """The analyses in a directory by the name of the model: its own, and those that it is compared with.

    Raises:
        UserError: there is no analysis.
    """
    if not (directory / "about.json").is_file():
        raise UserError(
            f"{directory} holds no about.json: name a directory that `python -m tokprune_exp.analyze MODEL_DIR` wrote"
        )
    folders = [directory, *sorted(path.parent for path in (directory / COMPARED).glob("*/about.json"))]
    found: dict[str, Path] = {}
    for folder in folders:
        method = json.loads((folder / "about.json").read_text("utf-8"))["model"]["method"]
        found[method if method not in found else f"{method} ({folder.name})"] = folder
    return found
