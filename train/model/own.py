"""Register the tower classes of this package with transformers' Auto classes."""

from __future__ import annotations


def register_own_classes() -> None:
    """Register the tower classes of this package with transformers' Auto classes."""
    from transformers import AutoConfig, AutoModel

    from train.model.eva import EvaVisionConfig, EvaVisionModel
    from train.model.multiscale import MultiscaleConfig, MultiscaleModel
    from train.model.timm_tower import TimmVisionConfig, TimmVisionModel

    classes = (
        (EvaVisionConfig, EvaVisionModel),
        (MultiscaleConfig, MultiscaleModel),
        (TimmVisionConfig, TimmVisionModel),
    )
    for config, model in classes:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
