"""The page, the figures and the tables of an analysis as one W&B run."""

from collections.abc import Sequence
from pathlib import Path

from tokprune_exp.analysis.figures.inputs import Tables
from tokprune_exp.config import LoggerConfig
from tokprune_exp.tracking import log_table, start_run

MOST_ROWS = 10_000
"""Of a table; W&B shows no more."""


def log_to_wandb(directory: Path, page: Path, figures: Sequence[Path], offline: bool = True) -> Path | None:
    """Log everything into one run of job type `analysis`, written below `directory`; returns an offline run's folder.

    `page` is the page, `figure/<name>` a picture, `<name>` the table of `<name>.csv`; no other table is logged, so that
    no text of the data leaves but those on the page and single words.

    Raises:
        UserError: the directory holds no analysis, or W&B starts no run.
    """
    import wandb  # half a second, and only where W&B is used

    tables = Tables(directory)
    about = tables.about
    model = about["model"]
    names = [model["method"], about["task"], model["backbone"]]
    group = "-".join(names)
    run = start_run(LoggerConfig(offline=offline), directory, f"analysis-{group}", group, "analysis", names)
    known = {key: about[key] for key in ("task", "split", "examples", "tagger", "random_draws", "bootstrap")}
    # without the model's directory, a path of this machine
    run.config.update({**known, "model": {key: model[key] for key in ("method", "backbone", "thresholds")}})
    run.log({"page": wandb.Html(page.read_text("utf-8"), inject=False, data_is_not_path=True)})
    for file in figures:
        run.log({f"figure/{file.stem}": wandb.Image(str(file))})
    for file in sorted(directory.glob("*.csv")):
        table = tables.csv(file.name).head(MOST_ROWS)
        rows = table.astype(object).where(table.notna(), None).to_numpy().tolist()
        log_table(run, file.stem, list(table.columns), rows)
    place = Path(run.dir).parent if offline else None
    run.finish()
    return place
