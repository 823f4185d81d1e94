"""The configuration of a run. Nothing heavy is imported here, so that a mistake in it is answered at once.

schema.py        every key, its type and its default
files.py         where conf/ and multirun_sweeps/ lie, and what there is to choose from
check.py         what is wrong with a composed configuration, everything at once, with the help of
  nodes.py         ways to read one that may be wrong
  construction.py  what a `_target_` may be and which arguments it takes
  pairs.py         choices that make no sense together
identity.py      its hash, and the folder of the run
"""

from tokprune_exp.config.check import ADDED_GROUPS, PRECISIONS, check_config, method_needed, unknown_key
from tokprune_exp.config.construction import instantiate
from tokprune_exp.config.files import choices, config_directory, load_task, sweep_directory
from tokprune_exp.config.identity import config_hash, overrides, run_directory, teacher_hash
from tokprune_exp.config.schema import LoggerConfig

__all__ = [
    "ADDED_GROUPS",
    "PRECISIONS",
    "LoggerConfig",
    "check_config",
    "choices",
    "config_directory",
    "config_hash",
    "instantiate",
    "load_task",
    "method_needed",
    "overrides",
    "run_directory",
    "sweep_directory",
    "teacher_hash",
    "unknown_key",
]
