"""Where the configuration's files lie, and what there is to choose from."""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from tokprune_exp.data.task import Task
from tokprune_exp.errors import UserError


def config_directory() -> Path:
    """Directory of the configuration files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    candidates = (package / "conf", package.parent / "conf")
    return next(directory for directory in candidates if (directory / "config.yaml").is_file())


def sweep_directory() -> Path:
    """Directory that holds the group `sweep`; it lies beside the configuration files."""
    return config_directory().parent / "multirun_sweeps"


def choices(group: str) -> list[str]:
    """Names of the files of one configuration group."""
    places = (config_directory() / group, sweep_directory() / group)
    return sorted(file.stem for place in places for file in place.glob("*.yaml"))


def load_task(name: str) -> Task:
    """Read conf/task/<name>.yaml.

    Raises:
        UserError: there is no such file.
    """
    file = config_directory() / "task" / f"{name}.yaml"
    if not file.is_file():
        raise UserError(f"the model is of task {name}, but there is no {file}; there are {', '.join(choices('task'))}")
    task = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Task), OmegaConf.load(file)))
    assert isinstance(task, Task)
    return task


class SweepDirectory(SearchPathPlugin):
    """Lets Hydra find `+sweep=NAME`, from any working directory."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the directory of the sweeps."""
        search_path.append("tokprune_exp", f"file://{sweep_directory()}")


Plugins.instance().register(SweepDirectory)
