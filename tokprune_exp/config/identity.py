"""Which run a configuration describes: its hash, and the folder that the same command always finds again."""

import hashlib
import json
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


def config_hash(cfg: DictConfig) -> str:
    """Eight hexadecimal digits that differ whenever a value differs that can change the result."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    for key in ("run_dir", "shared_dir", "overwrite", "logger", "tags"):
        values.pop(key, None)
    values["data"].pop("cache", None)
    for node, key in ((values, "start_from"), (values.get("teacher") or {}, "path")):
        weights = Path(node.get(key) or "") / "model.safetensors"  # a model is its weights, not its place
        if node.get(key) and weights.is_file():
            node[key] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def teacher_hash(cfg: DictConfig) -> str:
    """Digits that differ whenever a value differs that can change the dense model which is trained first."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    parts = {key: values[key] for key in ("seed", "task", "teacher", "optimizer", "data", "trainer", "epochs")}
    parts["data"].pop("cache", None)
    parts["warmup_fraction"] = values["method"].get("warmup_fraction")
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def run_directory(cfg: DictConfig, root: Path) -> Path:
    """`run_dir`, or a folder below `root` that the same command always finds again, to go on where it was stopped."""
    if cfg.run_dir is not None:
        return Path(cfg.run_dir)
    method = cfg.method._target_.split(".")[-2]
    return root / f"{method}-{cfg.task.name}-{cfg.backbone.name}-seed{cfg.seed}-{config_hash(cfg)}"


def overrides() -> list[str]:
    """Return what was chosen on the command line; nothing when the configuration was composed in Python."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
