"""In and out of files and of diffusers' own classes: where a pipeline's parts lie, and the two ways to hold weights."""

import json
import os
import re
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import DDPMScheduler, SchedulerMixin, UNet2DModel

from ddpm_hf.interop import stock_config
from ddpm_hf.models.unet import UNet2DModelCustom
from ddpm_hf.schedulers.ddpm import DDPMSchedulerCustom
from ddpm_hf.transfer import Retries, download_snapshot

WEIGHTS = re.compile(r"diffusion_pytorch_model(?P<variant>\.[^.]+?)?(-\d+-of-\d+)?\.(safetensors|bin)$")
INDEX = re.compile(r"diffusion_pytorch_model\.(safetensors|bin)\.index(?P<variant>\.[^.]+)?\.json$")


def snapshot(repo_id: str, allow_pickle: bool, **kwargs) -> Path:
    """The files of a pipeline from the Hub, each with the Hub's checksum: configurations and safetensors, or `.bin`
    weights where only those are. Errors as of `download_snapshot`."""
    if repo_id.count("/") > 1 or repo_id.startswith((".", "/")):
        raise FileNotFoundError(f"{repo_id!r} is no folder here, nor a repository's name (user/name).")
    configs = ["model_index.json", "config.json", "scheduler_config.json", "unet/*.json", "scheduler/*.json"]
    weights = ["diffusion_pytorch_model*", "unet/diffusion_pytorch_model*"]
    safe = [pattern + ".safetensors" for pattern in weights]
    kwargs.setdefault("retries", Retries(tries=3))  # somebody is waiting
    folder = download_snapshot(repo_id, allow_patterns=configs + ["*.safetensors.index.json"] + safe, **kwargs)
    if allow_pickle and not any(folder.rglob("*.safetensors")):
        # Read with weights_only: no code in a pickle is executed.
        folder = download_snapshot(repo_id, allow_patterns=configs + [p + ".bin" for p in weights], **kwargs)
    return folder


def part_folder(folder: Path, part: str, config_name: str, name: str) -> Path:
    """Where a part lies in a folder; `name` is what the user calls the folder, or the repository it is a copy of."""
    for candidate in (folder / part, folder):
        if (candidate / config_name).is_file():
            return candidate
    raise FileNotFoundError(f"{name} holds no pipeline: neither {part}/{config_name} nor {config_name} is there.")


def load_scheduler(folder: Path) -> SchedulerMixin:
    """The scheduler saved in a folder, of this package's class where diffusers' would be DDPMScheduler."""
    name = json.loads((folder / "scheduler_config.json").read_text()).get("_class_name", "DDPMScheduler")
    if name in ("DDPMScheduler", "DDPMSchedulerCustom"):
        return DDPMSchedulerCustom.from_pretrained(folder)
    if not hasattr(diffusers, name):
        raise ValueError(
            f"{folder / 'scheduler_config.json'} names the scheduler {name!r}, which diffusers does not have."
        )
    return getattr(diffusers, name).from_pretrained(folder)


def saved_T(folder: Path) -> int | None:
    """The length of the chain that a saved model was trained on, where its scheduler's file tells."""
    for file in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if file.is_file():
            return json.loads(file.read_text()).get("num_train_timesteps")
    return None


def unet_as(cls: type[UNet2DModel] | type[UNet2DModelCustom], unet) -> UNet2DModel | UNet2DModelCustom:
    """`unet` as an instance of the other class, made of the very same parameters: training or moving one is
    training or moving both. No weight is copied, and none is drawn at random on the way."""
    if type(unet) is cls:
        return unet
    with torch.device("meta"):
        twin = cls.from_config(stock_config(unet))
    twin.load_state_dict(unet.state_dict(keep_vars=True), assign=True)
    return twin.train(unet.training)


def scheduler_as(cls: type[DDPMScheduler] | type[DDPMSchedulerCustom], scheduler: SchedulerMixin) -> SchedulerMixin:
    """A DDPM scheduler as the other class; schedulers of other kinds as they are."""
    if type(scheduler) is cls or not isinstance(scheduler, (DDPMScheduler, DDPMSchedulerCustom)):
        return scheduler
    return cls.from_config(stock_config(scheduler))


def replace_save(beside: Path, folder: Path, variant: str | None) -> None:
    """Move a finished save from `beside` to its place `folder`: in one step where nothing is there; else part by
    part, each whole. Weights of another variant and files that are no weights stay in the part's folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        os.replace(beside, folder)
        return
    for part in sorted(beside.iterdir()):
        old = folder / part.name
        if part.is_dir() and old.is_dir():
            for file in old.iterdir():
                if not (part / file.name).exists() and _stays(file.name, variant):
                    os.replace(file, part / file.name)
            shutil.rmtree(old)
        os.replace(part, old)
    beside.rmdir()


def _stays(name: str, variant: str | None) -> bool:
    found = WEIGHTS.match(name) or INDEX.match(name)
    return found is None or (found["variant"] or "").lstrip(".") != (variant or "")
