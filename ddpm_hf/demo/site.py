"""The files of the page that runs a model in a browser. Any server of static files can serve them."""

import base64
import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

from ddpm_hf.export.graph import facts_of
from ddpm_hf.export.onnx_files import agrees, export_onnx
from ddpm_hf.files import atomic_file, check_output_folder
from ddpm_hf.models.onnx_unet import onnx_name
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.guidance import count_classes, cycled_labels
from ddpm_hf.schedulers.samplers import as_ddpm

WEB = Path(__file__).parent / "web"
VENDOR = "vendor"  # the folder of the site with its own copy of onnxruntime-web
NOT_FOR_THE_PAGE = ("unet_config", "scheduler_config")
NPM_SECONDS = 300


def site_files(model: str | Path) -> dict[str, Path | bytes]:
    """The files of the page for a saved model, by their names on the site: those of `web`, model.json and model.onnx.

    The network is the model's onnx/model.onnx if it has one of its weights, and is exported if not. onnxruntime-web is not
    among the files: a page without `vendor/` loads it from a CDN.

    Raises ValueError for a model that the page cannot sample from.
    """
    pipe = DDPMPipelineCustom.from_pretrained(model)
    check_page_can_sample(pipe)
    files: dict[str, Path | bytes] = {path.name: path for path in sorted(WEB.iterdir()) if path.is_file()}
    files["model.json"] = json.dumps({"name": Path(model).resolve().name, **page_facts(pipe)}).encode()
    exported = Path(model, onnx_name())
    is_there = exported.is_file() and agrees(exported, pipe)  # it may be that of an earlier training
    files["model.onnx"] = exported if is_there else _export(pipe)
    return files


def page_facts(pipe: DDPMPipelineCustom) -> dict:
    """What the page knows about a model: the facts of an export, without configurations, with the variance of DDPM and the
    labels of the classes (None for an unconditional model)."""
    facts = {name: value for name, value in facts_of(pipe).items() if name not in NOT_FOR_THE_PAGE}
    labels = cycled_labels(pipe.unet, range(count_classes(pipe.unet.config)))
    return {**facts, "variance_type": as_ddpm(pipe.scheduler).config.variance_type, "labels": labels}


def check_page_can_sample(pipe: DDPMPipelineCustom) -> None:
    """Raise ValueError, saying what is accepted, for a model that the page cannot sample from."""
    config, scheduler = pipe.unet.config, as_ddpm(pipe.scheduler).config
    rules = {
        "channels": (config.in_channels, config.in_channels in (1, 3), "1 or 3"),
        "sample_size": (config.sample_size, bool(config.sample_size), "a size"),
        "class_embed_type": (config.class_embed_type, config.class_embed_type is None, "None"),
        "time_embedding_type": (config.time_embedding_type, config.time_embedding_type != "learned", "not 'learned'"),
        "variance_type": (scheduler.variance_type, scheduler.variance_type.startswith("fixed_"), "a fixed variance"),
        "thresholding": (scheduler.thresholding, not scheduler.thresholding, "False"),
    }
    for name, (value, is_accepted, accepted) in rules.items():
        if not is_accepted:
            raise ValueError(f"{name} of a model for the page must be {accepted}, got {value!r}.")


def write_site(model: str | Path, folder: str | Path) -> None:
    """Write `site_files` into a folder. Other files in it are kept. Raises ValueError if they cannot be written there."""
    folder = Path(folder)
    check_output_folder("folder", folder, ["index.html"], [VENDOR])
    files = site_files(model)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        atomic_file(folder / name, content if isinstance(content, bytes) else content.read_bytes())


def add_runtime(folder: str | Path) -> bool:
    """Copy the files of onnxruntime-web from npm into `vendor/` of a site. False if npm is not installed or cannot get them.

    Raises ValueError for a file whose hash is not that of web/runtime.json, which the page would refuse.
    """
    runtime = json.loads((WEB / "runtime.json").read_text(encoding="utf-8"))
    command = ["npm", "pack", "--silent", "--prefer-offline", f"onnxruntime-web@{runtime['version']}"]
    with tempfile.TemporaryDirectory() as downloads:
        try:
            subprocess.run(command, cwd=downloads, check=True, capture_output=True, timeout=NPM_SECONDS)
        except (OSError, subprocess.SubprocessError):
            return False
        (package,) = Path(downloads).glob("*.tgz")
        with tarfile.open(package) as archive:
            contents = {name: archive.extractfile(f"package/dist/{name}").read() for name in runtime["files"]}
    for name, content in contents.items():
        if (found := integrity(content)) != runtime["files"][name]:
            raise ValueError(f"{name} of npm must have the hash {runtime['files'][name]}, got {found}.")
    (Path(folder) / VENDOR).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        atomic_file(Path(folder) / VENDOR / name, content)
    return True


def integrity(content: bytes) -> str:
    """The hash of a file as browsers check it (subresource integrity)."""
    return "sha384-" + base64.b64encode(hashlib.sha384(content).digest()).decode()


def _export(pipe: DDPMPipelineCustom) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(pipe, folder)
        return Path(folder, onnx_name()).read_bytes()
