"""What a run leaves behind: result.json, the loggers' files and the table on the screen.

result.json is the record; CSV and Weights & Biases are views of it and of the training curves.
"""

from tokprune_exp.tracking.loggers import LoggerSettings, close, make_loggers, quieten_lightning
from tokprune_exp.tracking.record import RunRecord, hardware, json_safe, versions, write_json
from tokprune_exp.tracking.results import log_result
from tokprune_exp.tracking.screen import print_summary, summary_table
from tokprune_exp.tracking.weights_and_biases import log_table, start_run, wandb_runs

__all__ = [
    "LoggerSettings",
    "RunRecord",
    "close",
    "hardware",
    "json_safe",
    "log_result",
    "log_table",
    "make_loggers",
    "print_summary",
    "quieten_lightning",
    "start_run",
    "summary_table",
    "versions",
    "wandb_runs",
    "write_json",
]
