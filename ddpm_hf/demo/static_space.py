"""The files of a static Space that shows the page of a model."""

from pathlib import Path

from ddpm_hf.demo.site import site_files

CARD = """---
title: {title}
sdk: static
app_file: index.html
license: apache-2.0
{models}tags: [ddpm, diffusion, ddpm_hf]
---

# {title}

A denoising diffusion model that runs in the visitor's browser: every step from noise to an image, with its numbers.{source}
"""


def space_files(model: str | Path, title: str, repo_id: str | None = None) -> dict[str, Path | bytes]:
    """The page of a saved model with a card of a Space, by their names.

    Args:
        title: of the Space.
        repo_id: the model's name on the Hub, which the card then links to.

    Raises ValueError for a model that the page cannot sample from.
    """
    models = "" if repo_id is None else f"models: [{repo_id}]\n"
    source = "" if repo_id is None else f" The model is [{repo_id}](https://huggingface.co/{repo_id})."
    return site_files(model) | {"README.md": CARD.format(title=title, models=models, source=source).encode()}
