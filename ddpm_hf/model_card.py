"""The model card: Hub metadata, how to use the model, how it was made, and figures that were measured."""

from pathlib import Path

import diffusers
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import __version__


def make_card(template: Path, config_yaml: str, metrics: dict) -> ModelCard:
    """The card of a trained model.

    Args:
        template: a Jinja template (model_cards/template.md).
        config_yaml: the resolved training configuration.
        metrics: "training", and "quality" if it was measured, as `metrics.json` holds them.
    """
    config = yaml.safe_load(config_yaml)
    name = Path(config["output_dir"]).name
    quality = metrics.get("quality")
    dataset = "scikit-learn/load_digits" if config["dataset"] == "digits" else config["dataset"]
    on_hub = config["dataset"] != "digits" and not Path(config["dataset"]).exists()
    results = []
    if quality:
        results.append(
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=dataset,
                dataset_name="scikit-learn digits, held-out part",
                metric_type="recognised_ratio",
                metric_name=f"share of {quality['num_samples']} samples recognised, of that of real digits",
                metric_value=round(quality["recognised_ratio"], 4),
            )
        )
    data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        datasets=[dataset] if on_hub else None,
        tags=["ddpm", "diffusion", "ddpm_hf"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(template),
        name=name,
        dataset=dataset,
        config=config,
        config_yaml=config_yaml,
        training=metrics["training"],
        quality=quality,
        versions={"ddpm_hf": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    )
