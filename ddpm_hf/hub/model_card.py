"""The model card: Hub metadata, how to use the model, how it was made, and figures that were measured."""

import hashlib
import re
from pathlib import Path

import diffusers
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ddpm_hf import __version__
from ddpm_hf.data.builtin import BUILTIN
from ddpm_hf.evaluation.judges import judge_of

TEMPLATE = Path(__file__).with_name("model_card_template.md")


def make_card(config_yaml: str, metrics: dict) -> ModelCard:
    """The card of a trained model.

    Args:
        config_yaml: the resolved training configuration.
        metrics: "training", and "quality", "evaluation", "steps_and_variances" and "ema" where they were measured, as
            `metrics.json` holds them.
    """
    config = yaml.safe_load(config_yaml)
    name = Path(config["output_dir"]).name
    quality = metrics.get("quality")
    builtin = BUILTIN.get(config["dataset"])
    dataset = builtin.source if builtin else config["dataset"]
    on_hub = builtin is None and not Path(config["dataset"]).exists()
    judge = judge_of(config["dataset"]) if quality else None
    results = judge.card_results(quality, dataset) if judge else []
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
        template_path=str(TEMPLATE),
        name=name,
        dataset=dataset,
        config=config,
        config_yaml=config_yaml,
        training=metrics["training"],
        quality=quality,
        quality_section=judge.card_section(quality).strip() if judge else None,
        evaluation=metrics.get("evaluation"),
        table=metrics.get("steps_and_variances"),
        average=average_of_weights(config, metrics),
        ema=metrics.get("ema"),
        versions={"ddpm_hf": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    )


def average_of_weights(config: dict, metrics: dict) -> str:
    """How the published weights are averaged, to go after that word: by training/choose_ema.py, or as the run was told."""
    chosen = metrics.get("ema")
    if chosen and chosen["length"] is not None:
        return (
            f"by a power function of length σ_rel = {chosen['length']:g} over {chosen['images_seen']:,} images "
            f"(`training/choose_ema.py`, which took the best of {len(chosen['curve'])} lengths by {chosen['criterion']})"
        )
    if config.get("ema_decay") is not None:
        return f"with a decay of {config['ema_decay']:g} a step"
    return f"over a half-life of {config['ema_halflife_images']:,} images"


def evaluation_results(evaluation: dict | None) -> list[EvalResult]:
    """The figures of training/evaluate.py as the Hub keeps them, the protocol in each one's name."""
    if not evaluation:
        return []
    protocol = evaluation["protocol"]
    how = f"{protocol['sampler']}, {protocol['steps']} steps, seed {protocol['seed']}"
    rows = [
        ("bits_per_dim", f"bits/dim (upper bound), {name}, {bound['num_images']} images", bound["bits_per_dim"])
        for name, bound in evaluation["bits_per_dim"].items()
        if name.startswith("validation")
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


# ------------------------------------------------------------------ the card on the Hub

BEGIN = "<!-- ddpm_hf {}: what lies between these two lines is written anew when the model is published again -->\n"
END = "<!-- /ddpm_hf -->\n"
OURS = re.compile(re.escape(BEGIN).replace(r"\{\}", "([0-9a-f]{16})") + "(.*?)" + re.escape(END), re.DOTALL)
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?\r?\n)?---[ \t]*(\r?\n|\Z)", re.DOTALL)
KEPT_EDITS = "\n## From an earlier card\n\n"


def plain_card(repo_id: str) -> str:
    """The card of a pipeline that came without one: what the Hub needs to know, and how to load it."""
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["ddpm", "diffusion", "ddpm_hf"],
    )
    examples = "".join(
        f"```python\nfrom {module} import {name}\n\n"
        f'pipe = {name}.from_pretrained("{repo_id}")\nimages = pipe(batch_size=16{more}).images\n```\n\n'
        for module, name, more in (
            ("ddpm_hf", "DDPMPipelineCustom", ""),
            # Stock takes 1000 steps unless told, and refuses them where the chain is shorter.
            ("diffusers", "DiffusionPipeline", ", num_inference_steps=len(pipe.scheduler)"),
        )
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {repo_id.rsplit('/', 1)[-1]}\n\n{examples.rstrip()}\n"


def card_for_repository(text: str, repo_id: str) -> str:
    """A card whose examples load the repository rather than a folder."""
    return re.sub(r'from_pretrained\("[^"]*"\)', f'from_pretrained("{repo_id}")', text)


def merge_cards(ours: str, theirs: str) -> str:
    """Our card, put into the one that is on the Hub ("" for none), of which nothing that a person wrote is lost.

    The text: ours stands between two comments and replaces what stood between them. Everything outside stays. Where
    there are no such comments, ours comes below the text that is there; text that was edited between them is kept below.
    The metadata: library, pipeline tag and this model's results are ours, tags and data sets those of both, and of
    everything else (the license, say) what is there stays.
    """
    our_data, our_text = _split(ours)
    data, text = _split(theirs)
    for key, value in our_data.items():
        if key in ("library_name", "pipeline_tag"):
            data[key] = value
        elif key in ("tags", "datasets") and isinstance(data.get(key), list):
            data[key] += [entry for entry in value if entry not in data[key]]
        else:
            data.setdefault(key, value)
    mine = our_data.get("model-index") or []
    names = {entry["name"] for entry in mine} or {re.match(r"\s*# (.*)\n|", our_text)[1]}
    others = [entry for entry in data.get("model-index") or [] if entry.get("name") not in names]
    data["model-index"] = others + mine
    if not data["model-index"]:
        del data["model-index"]

    our_text = our_text.strip("\n") + "\n"
    block = BEGIN.format(_digest(our_text)) + our_text + END
    found = OURS.search(text)
    if found is None:
        text = (text.strip("\n") + "\n\n").lstrip("\n") + block
    else:
        edited = "" if _digest(found[2]) == found[1] else KEPT_EDITS + found[2].strip("\n") + "\n"
        text = text[: found.start()].lstrip("\n") + block + text[found.end() :] + edited
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{text}"


def _split(card: str) -> tuple[dict, str]:
    """Metadata and text of a card; metadata that are no YAML count as text."""
    found = FRONT_MATTER.match(card)
    if found is None:
        return {}, card
    try:
        data = yaml.safe_load(found[1] or "") or {}
    except yaml.YAMLError:
        return {}, card
    return (data, card[found.end() :]) if isinstance(data, dict) else ({}, card)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
