"""Load and save pipelines, and convert models and schedulers between this package's classes and diffusers'."""

import inspect
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, SchedulerMixin, UNet2DModel
from diffusers.utils import DummyObject
from diffusers.utils.torch_utils import unwrap_module

from ddpm_hf.checks import ArgumentTypeError, shown
from ddpm_hf.files import move_file, staging_folder
from ddpm_hf.interop import stock_config
from ddpm_hf.model_files import class_name, read_json_object
from ddpm_hf.models.onnx_unet import OnnxUNet, onnx_name
from ddpm_hf.models.unet import UNet2DModelCustom
from ddpm_hf.pipelines.guidance import check_marks
from ddpm_hf.schedulers.samplers import OWN
from ddpm_hf.transfer.downloads import Retries, download_snapshot

WEIGHTS = re.compile(r"diffusion_pytorch_model(?P<variant>\.[^.]+?)?(-\d+-of-\d+)?\.(safetensors|bin)$")
INDEX = re.compile(r"diffusion_pytorch_model\.(safetensors|bin)\.index(?P<variant>\.[^.]+)?\.json$")
LIBRARIES = ("diffusers", "ddpm_hf")
OWN_SCHEDULERS = tuple(OWN.values())
# Those of diffusers' `ModelMixin.from_pretrained` that load one network into a pipeline.
UNET_OPTIONS = (
    "torch_dtype", "variant", "use_safetensors", "device_map", "max_memory", "offload_folder", "offload_state_dict",
    "low_cpu_mem_usage", "disable_mmap", "quantization_config",
)  # fmt: skip
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def download_pipeline(repo_id: str, allow_pickle: bool, onnx_file: str | None = None, **kwargs) -> Path:
    """Download a pipeline's configurations and safetensors from the Hub and return the folder. If it has no
    safetensors and `allow_pickle`, its `.bin` weights. With `onnx_file`, this file alone. Errors are those of
    `download_snapshot`."""
    for name, kinds in {"revision": str, "cache_dir": (str, Path), "token": (str, bool)}.items():
        if kwargs.get(name) is not None and not isinstance(kwargs[name], kinds):
            raise ArgumentTypeError(f"{name} must be a string or None, got {type(kwargs[name]).__name__}.")
    if repo_id.count("/") > 1 or repo_id.startswith((".", "/")):
        raise FileNotFoundError(f"{repo_id!r} is neither a local folder nor the name of a repository (user/name).")
    configs = ["model_index.json", "config.json", "scheduler_config.json", "unet/*.json", "scheduler/*.json"]
    weights = ["diffusion_pytorch_model*", "unet/diffusion_pytorch_model*"]
    safe = [pattern + ".safetensors" for pattern in weights]
    kwargs.setdefault("retries", Retries(tries=3))  # few, since a person is waiting
    try:
        if onnx_file is not None:
            return download_snapshot(repo_id, allow_patterns=[onnx_file], **kwargs)
        patterns = [*configs, "*.safetensors.index.json", *safe]
        folder = download_snapshot(repo_id, needed=_has_configurations, allow_patterns=patterns, **kwargs)
        if allow_pickle and not any(folder.rglob("*.safetensors")):
            # Read with weights_only: no code in a pickle is executed.
            patterns += [pattern + ".bin" for pattern in weights]
            folder = download_snapshot(repo_id, needed=_has_weights, allow_patterns=patterns, **kwargs)
    except Exception as error:
        error.add_note(f"There is no folder {repo_id!r} here, so it was looked for on the Hub.")
        raise
    return folder


def _has_configurations(folder: Path) -> bool:
    return any(folder.rglob("config.json")) and any(folder.rglob("scheduler_config.json"))


def _has_weights(folder: Path) -> bool:
    return _has_configurations(folder) and any(WEIGHTS.match(file.name) for file in folder.rglob("*"))


def check_options(options: Mapping) -> None:
    """Raise ArgumentTypeError for options of `from_pretrained` that nothing would read."""
    known = (*UNET_OPTIONS, *list(inspect.signature(UNet2DModelCustom).parameters))
    if unknown := sorted(options.keys() - set(known)):
        accepted = ("unet", "scheduler", *DOWNLOAD_OPTIONS, *known)
        raise ArgumentTypeError(f"{unknown[0]} must be an option of from_pretrained, which are {', '.join(accepted)}.")


def find_component(folder: Path, component: str, config_name: str, source: str) -> Path:
    """The folder of a pipeline's component: its subfolder or, in repositories such as google/ddpm-*, the root.
    `source` is what the error message calls the pipeline."""
    for candidate in (folder / component, folder):
        if (candidate / config_name).is_file():
            return candidate
    raise FileNotFoundError(f"{source} holds no pipeline: it has neither {component}/{config_name} nor {config_name}.")


def check_model_index(folder: Path, components: Collection[str]) -> None:
    """Raise ValueError if the folder's model_index.json, which may be missing, names other classes for `components` than
    a DDPM pipeline has, or other components. No class or module that it names is imported."""
    path = folder / "model_index.json"
    if not path.is_file():
        return
    index = read_json_object(path)
    class_name(path, index, "DDPMPipeline")
    parts = {name: entry for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_")}
    named = {name for name, entry in parts.items() if entry != [None, None]}
    if unknown := sorted(named - KNOWN_COMPONENTS.keys()):
        raise ValueError(f"{path} names the component {unknown[0]!r}, a DDPM pipeline has {list(KNOWN_COMPONENTS)}.")
    for component in components:
        entry = index.get(component)
        is_pair = isinstance(entry, list) and len(entry) == 2 and entry[0] in LIBRARIES
        if not is_pair or not KNOWN_COMPONENTS[component](entry[1]):
            expected = f"a class of {' or '.join(LIBRARIES)} for the {component}"
            raise ValueError(f"{path} must name {expected}, got {shown(entry)}.")


def scheduler_class(name: Any) -> type[SchedulerMixin] | None:
    """The class for a scheduler that a file calls `name`: of this package for a DDPMScheduler or DDIMScheduler, or a
    scheduler of diffusers. None for other names."""
    for cls in OWN_SCHEDULERS:
        if name in (cls.__name__, cls.stock_class.__name__):
            return cls
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    is_scheduler = isinstance(found, type) and issubclass(found, SchedulerMixin) and issubclass(found, ConfigMixin)
    # A dummy stands for a class whose libraries are not installed, and says so when it is used.
    return found if is_scheduler or (isinstance(found, DummyObject) and name.endswith("Scheduler")) else None


KNOWN_COMPONENTS: dict[str, Callable[[Any], bool]] = {
    "unet": lambda name: name in (UNet2DModelCustom.__name__, UNet2DModel.__name__),
    "scheduler": lambda name: scheduler_class(name) is not None,
}


def load_scheduler(folder: Path, source: str) -> SchedulerMixin:
    """The scheduler of a saved pipeline; a DDPMScheduler or DDIMScheduler becomes the one of this package."""
    path = find_component(folder, "scheduler", "scheduler_config.json", source) / "scheduler_config.json"
    name = class_name(path, read_json_object(path), "DDPMScheduler")
    cls = scheduler_class(name)
    if cls is None:
        raise ValueError(f"{path} must name a scheduler of diffusers, got {shown(name)}.")
    try:
        return cls.from_pretrained(path.parent)
    except (OSError, ImportError):
        raise
    except Exception as error:  # of any type, by scheduler and argument
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} does not describe a {name}: {error}") from error


def load_unet(folder: Path, source: str, **kwargs) -> UNet2DModelCustom:
    """The network of a saved pipeline; `kwargs` are those of `UNet2DModelCustom.from_pretrained`."""
    folder = find_component(folder, "unet", "config.json", source)
    if not any(folder.glob("*.safetensors")):
        kwargs.setdefault("use_safetensors", False)  # diffusers logs an error before it tries .bin
    unet = UNet2DModelCustom.from_pretrained(folder, **kwargs)
    check_marks(unet, f"{folder}/config.json")
    return unet


def load_onnx(folder: Path, variant: str | None) -> tuple[OnnxUNet, SchedulerMixin]:
    """The network of a folder's ONNX file, and the scheduler that the file records."""
    file = folder / onnx_name(variant)
    unet = OnnxUNet(file)
    check_marks(unet, str(file))
    config = unet.facts["scheduler_config"]
    return unet, scheduler_class(config["_class_name"]).from_config(config)


def check_has_weights(unet, what: str) -> None:
    """Raise ValueError, naming what was asked for, if the network is not one of PyTorch."""
    if isinstance(unet, OnnxUNet):
        raise ValueError(f"{what} needs the network in PyTorch, and backend='onnxruntime' has none: load it without.")


def saved_num_train_timesteps(folder: Path) -> int | None:
    """The T that a saved model was trained with, according to its scheduler's file; None without one."""
    files = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    return next((read_json_object(f).get("num_train_timesteps") for f in files if f.is_file()), None)


def convert_unet(unet, cls: type[UNet2DModel] | type[UNet2DModelCustom]) -> UNet2DModel | UNet2DModelCustom:
    """`unet` as an instance of `cls` with the same parameter objects: training or moving one trains or moves both. Of a
    compiled network it is the network itself."""
    unet = unwrap_module(unet)
    check_has_weights(unet, "conversion to and from diffusers")
    if type(unet) is cls:
        return unet
    with torch.device("meta"):  # no weights are allocated or initialized
        converted = cls.from_config(stock_config(unet))
    converted.load_state_dict(unet.state_dict(keep_vars=True), assign=True)
    return converted.train(unet.training)


def to_own_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A DDPMScheduler or DDIMScheduler as the one of this package; others unchanged."""
    classes = {cls.stock_class: cls for cls in OWN_SCHEDULERS}
    cls = classes.get(type(scheduler))
    return scheduler if cls is None else cls.from_config(stock_config(scheduler))


def to_stock_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A scheduler of this package as the one of diffusers; others unchanged."""
    is_own = isinstance(scheduler, OWN_SCHEDULERS)
    return scheduler.stock_class.from_config(stock_config(scheduler)) if is_own else scheduler


def move_saved(staged: Path, folder: Path, variant: str | None) -> None:
    """Move a finished save to its folder: in one step if the folder is new, else component by component. Weights of
    other variants, and files that are not weights, are kept."""
    if not folder.exists():
        os.replace(staged, folder)
        return
    for component in sorted(staged.iterdir()):
        old = folder / component.name
        if old.is_dir() and (old.is_symlink() or old.is_mount()):  # perhaps on another disk
            _replace_files(component, old, variant)
            continue
        if component.is_dir() and old.is_dir():
            for file in old.iterdir():
                if not (component / file.name).exists() and _is_kept(file.name, variant):
                    os.replace(file, component / file.name)
            shutil.rmtree(old)
        os.replace(component, old)


def _replace_files(component: Path, old: Path, variant: str | None) -> None:
    """Replace the files of a component whose folder must stay, after all of the new ones are on its disk."""
    names = {file.name for file in component.iterdir()}
    with staging_folder(old) as staged:
        for name in names:
            move_file(component / name, staged / name)
        for name in names:
            os.replace(staged / name, old / name)
    for file in old.iterdir():
        if file.name not in names and not _is_kept(file.name, variant):
            file.unlink()


def _is_kept(name: str, variant: str | None) -> bool:
    found = WEIGHTS.match(name) or INDEX.match(name)
    return found is None or (found["variant"] or "").lstrip(".") != (variant or "")
