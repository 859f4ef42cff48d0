"""The public address of ``ModelConfig`` and its readers, wherever they live inside the package."""

from .models.config import ModelConfig, load_config, parse_config

__all__ = ["ModelConfig", "load_config", "parse_config"]
