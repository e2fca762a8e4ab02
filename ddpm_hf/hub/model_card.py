"""Model cards: metadata for the Hub, usage, the training recipe and measured figures."""

import hashlib
import re
from contextlib import suppress
from pathlib import Path

import diffusers
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ddpm_hf import __version__
from ddpm_hf.data.builtin import BUILTIN
from ddpm_hf.evaluation.judges import judge_of
from ddpm_hf.evaluation.report import bits_per_dim, sampler_name
from ddpm_hf.hub.local_paths import is_local, public_config, public_name

TEMPLATE = Path(__file__).with_name("model_card_template.md")
PLAIN_TEMPLATE = Path(__file__).with_name("plain_card_template.md")
VERSIONS = ("ddpm_hf", "torch", "diffusers")
METADATA = {
    "library_name": "diffusers",
    "pipeline_tag": "unconditional-image-generation",
    "tags": ["ddpm", "diffusion", "ddpm_hf"],
}


def make_card(config_yaml: str, metrics: dict) -> ModelCard:
    """The card of a trained model.

    A data set or folder given as a path is named by the last part of the path, or by the option `dataset_name`.

    Args:
        config_yaml: the resolved training configuration.
        metrics: the content of `metrics.json`: "training", and those of "quality", "evaluation" and "ema" that were
            measured.
    """
    given = yaml.safe_load(config_yaml)
    config = public_config(given)
    if config != given:
        config_yaml = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    name, quality = public_name(str(Path(given["output_dir"]).resolve())), metrics.get("quality")
    builtin = BUILTIN.get(given["dataset"])
    dataset = config.get("dataset_name") or (builtin.source if builtin else config["dataset"])
    # The names of data sets on the Hub have an owner. A single word is what remains of a path in a published configuration.
    is_on_hub = builtin is None and "/" in given["dataset"] and not is_local(given["dataset"])
    judge = judge_of(given["dataset"]) if quality else None
    results = judge.card_results(quality, dataset) if judge else []
    results += evaluation_results(metrics.get("evaluation"))
    data = ModelCardData(license="apache-2.0", **METADATA)
    if is_on_hub:
        data.datasets = [given["dataset"]]
    here = {"ddpm_hf": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    trained_with = (metrics.get("training") or {}).get("versions") or here  # not recorded by earlier versions
    base = given.get("init_from")
    if base is not None and not is_local(base):
        data.base_model = base
    if results:
        data.model_name, data.eval_results = name, results
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        **metrics,
        name=name,
        dataset=dataset,
        config=config,
        config_yaml=config_yaml,
        quality_section=judge.card_section(quality).strip() if judge else None,
        average=average_of_weights(config, metrics),
        class_names=_class_names(metrics),
        sampler_name=sampler_name,
        bits_per_dim=bits_per_dim,
        versions={name: trained_with[name] for name in VERSIONS if name in trained_with},
    )


def _class_names(metrics: dict) -> list[str] | None:
    """The names of the classes, if they say more than their numbers."""
    names = (metrics.get("training") or {}).get("class_names")
    return None if names == [str(i) for i in range(len(names or ()))] else names


def average_of_weights(config: dict, metrics: dict) -> str:
    """How the published weights are averaged, as a phrase that follows the word "averaged"."""
    chosen = metrics.get("ema")
    if chosen and chosen["length"] is not None:
        average = f"by a power function of length σ_rel = {chosen['length']:g} over {chosen['images_seen']:,} images"
        lengths = f"{len(chosen['curve'])} lengths by {chosen['criterion']}"
        return f"{average} (chosen by `ddpm-choose-ema` as the best of {lengths})"
    if config.get("ema_decay") is not None:
        return f"with a decay of {config['ema_decay']:g} per step"
    return f"over a half-life of {config['ema_halflife_images']:,} images"


def evaluation_results(evaluation: dict | None) -> list[EvalResult]:
    """The figures of `ddpm-evaluate` as model-index entries. Each name states the protocol."""
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
        (f["name"].split(",")[0], f"{f['name']}, to {f['protocol']['reference']}, {how}", f["value"])
        for f in evaluation["figures"]
    ]
    source = ("unconditional-image-generation", public_name(evaluation["dataset"]), Path(evaluation["dataset"]).name)
    return [EvalResult(*source, kind, round(value, 5), metric_name=name) for kind, name, value in rows]


def update_results(card_text: str, name: str, evaluation: dict) -> str:
    """A card of any origin with the figures of an evaluation in its model-index, replacing older values of the same ones."""
    card = ModelCard(card_text)
    new = evaluation_results(evaluation)
    replaced = {(result.dataset_type, result.metric_name) for result in new}
    kept = [r for r in card.data.eval_results or [] if (r.dataset_type, r.metric_name) not in replaced]
    card.data.eval_results = kept + new
    card.data.model_name = card.data.model_name or name
    return str(card)


# ------------------------------------------------------------------ cards on the Hub

BEGIN = "<!-- ddpm_hf {}: the text between these two lines is replaced when the model is published again -->\n"
END = "<!-- /ddpm_hf -->\n"
GENERATED = re.compile(r"<!-- ddpm_hf ([0-9a-f]{16}): [^\n]* -->\n(.*?)" + re.escape(END), re.DOTALL)
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?\r?\n)?---[ \t]*(\r?\n|\Z)", re.DOTALL)
KEPT_EDITS = "\n## From an earlier card\n\n"


def plain_card(repo_id: str) -> str:
    """The card of a pipeline without one: metadata, and how to load it."""
    names = {"title": repo_id.rsplit("/", 1)[-1], "repo_id": repo_id}
    return str(ModelCard.from_template(ModelCardData(**METADATA), template_path=str(PLAIN_TEMPLATE), **names))


def card_for_repository(text: str, repo_id: str) -> str:
    """The card with examples that load the repository instead of a local folder."""
    return re.sub(r'from_pretrained\("[^"]*"\)', f'from_pretrained("{repo_id}")', text)


def merge_cards(ours: str, theirs: str) -> str:
    """Our generated card merged into the card on the Hub ("" for none). Nothing that a person wrote is lost.

    Text: ours stands between two comments and replaces the text between them. Text outside them stays. If there are no
    such comments, ours is appended. If a person edited the text between them, the edited text is moved below.
    Metadata: library, pipeline tag and this model's results are ours. Tags and data sets are combined. All else, such as
    the license, stays as it is on the Hub.
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
    found = GENERATED.search(text)
    if found is None:
        text = (text.strip("\n") + "\n\n").lstrip("\n") + block
    else:
        edited = "" if _digest(found[2]) == found[1] else KEPT_EDITS + found[2].strip("\n") + "\n"
        text = text[: found.start()].lstrip("\n") + block + text[found.end() :] + edited
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{text}"


def _split(card: str) -> tuple[dict, str]:
    """Metadata and text of a card. Front matter that is not a YAML mapping counts as text."""
    found, data = FRONT_MATTER.match(card), None
    if found is not None:
        with suppress(yaml.YAMLError):
            data = yaml.safe_load(found[1] or "") or {}
    return (data, card[found.end() :]) if isinstance(data, dict) else ({}, card)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
