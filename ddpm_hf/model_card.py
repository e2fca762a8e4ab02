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
        metrics: "training", and "quality", "evaluation", "steps_and_variances" and "ema" where they were measured, as
            `metrics.json` holds them.
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
    results += evaluation_results(metrics.get("evaluation"))
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
        evaluation=metrics.get("evaluation"),
        table=metrics.get("steps_and_variances"),
        average=average_of_weights(config, metrics),
        ema=metrics.get("ema"),
        versions={"ddpm_hf": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    )


def average_of_weights(config: dict, metrics: dict) -> str:
    """How the published weights are averaged, to go after that word: by training/ema.py, or as the run was told."""
    chosen = metrics.get("ema")
    if chosen and chosen["length"] is not None:
        return (
            f"by a power function of length σ_rel = {chosen['length']:g} over {chosen['images_seen']:,} images "
            f"(`training/ema.py`, which took the best of {len(chosen['curve'])} lengths by {chosen['criterion']})"
        )
    if config.get("ema_decay") is not None:
        return f"with a decay of {config['ema_decay']:g} a step"
    return f"over a half-life of {config['ema_halflife_images']} images"


def evaluation_results(evaluation: dict | None) -> list[EvalResult]:
    """The figures of training/evaluate.py as the Hub keeps them, the protocol in each one's name."""
    if not evaluation:
        return []
    protocol = evaluation["protocol"]
    how = f"{protocol['sampler']}, {protocol['steps']} steps, seed {protocol['seed']}"
    rows = [
        ("bits_per_dim", f"bits/dim (upper bound), {name}, {bound['num_images']} images", bound["bits_per_dim"])
        for name, bound in evaluation["bits_per_dim"].items()
        if name.startswith("held-out")
    ]
    rows += [
        (f["name"].split(",")[0], f"{f['name']}, to the {protocol['split']} split, {how}", f["value"])
        for f in evaluation["figures"]
    ]
    return [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=evaluation["dataset"],
            dataset_name=Path(evaluation["dataset"]).name,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 5),
        )
        for kind, name, value in rows
    ]


def update_results(card_text: str, name: str, evaluation: dict) -> str:
    """A card of any origin with the figures of an evaluation in its model-index; measured again, a figure is replaced."""
    card = ModelCard(card_text)
    new = evaluation_results(evaluation)
    replaced = {(result.dataset_type, result.metric_name) for result in new}
    kept = [r for r in card.data.eval_results or [] if (r.dataset_type, r.metric_name) not in replaced]
    card.data.eval_results = kept + new
    card.data.model_name = card.data.model_name or name
    return str(card)
