"""The files of a Space that runs the Gradio app for a published model."""

import importlib.metadata
import platform
from pathlib import Path

import ddpm_hf

APP = '''"""The demo of {repo_id}."""

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.demo.app import make_app

app = make_app(DDPMPipelineCustom.from_pretrained("{repo_id}"), "{repo_id}")

if __name__ == "__main__":
    app.launch()
'''
CARD = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
license: apache-2.0
models: [{repo_id}]
tags: [ddpm, diffusion, ddpm_hf]
---

# {title}

Sampling and editing with [{repo_id}](https://huggingface.co/{repo_id}), a denoising diffusion model. `ddpm_hf` is in this Space as source.
"""
LIBRARY = Path(ddpm_hf.__file__).parent
KINDS = (".py", ".md", ".yaml", ".typed")


def gradio_files(repo_id: str) -> dict[str, Path | bytes]:
    """All files of the Space, by their names: the app, its requirements with the versions installed here, its card, and
    this package."""
    source = {f"ddpm_hf/{path.relative_to(LIBRARY).as_posix()}": path for path in sorted(LIBRARY.rglob("*"))}
    source = {name: path for name, path in source.items() if path.suffix in KINDS and "/scripts/" not in name}
    title, python = repo_id.split("/")[-1], platform.python_version().rpartition(".")[0]
    card = CARD.format(repo_id=repo_id, title=title, gradio=importlib.metadata.version("gradio"), python=python)
    return source | {
        "app.py": APP.format(repo_id=repo_id).encode(),
        "requirements.txt": "\n".join(requirements()).encode() + b"\n",
        "README.md": card.encode(),
    }


def requirements() -> list[str]:
    """The packages that this one needs, with the versions installed here."""
    names = [
        r.split(">")[0].split("<")[0].split(";")[0] for r in importlib.metadata.requires("ddpm_hf") if "extra" not in r
    ]
    # A local version, such as torch 2.13.0+cpu, is not on the index of packages.
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]
