"""DDPMPipelineCustom: from noise to images, and in and out of the Hub."""

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

import diffusers
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download

from .gaussian import LEARNED_VARIANCES
from .interop import SavesAsStock, refuse_pickle
from .scheduler import DDPMSchedulerCustom
from .unet import UNet2DModelCustom

OUTPUT_TYPES = ("pil", "np", "pt")
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class DenoisingStep:
    """What one reverse step leaves: the timestep t it started from, x_{t−1} and the x_0 predicted at t. Images are
    (B, C, H, W) in [-1, 1]; `x_0` is None for a scheduler that does not tell it. The process goes on from `x`, so
    that assigning to it steers the rest."""

    t: int | torch.Tensor
    x: torch.Tensor
    x_0: torch.Tensor | None


class DDPMPipelineCustom(SavesAsStock, DiffusionPipeline):
    """Unconditional image generation with a DDPM.

    Args:
        unet: the noise predictor, `UNet2DModelCustom` or diffusers' `UNet2DModel`.
        scheduler: `DDPMSchedulerCustom` or a diffusers scheduler that can run the model.

    Example:
        >>> pipe = DDPMPipelineCustom.from_pretrained("outputs/digits")
        >>> images = pipe(batch_size=16, generator=torch.Generator().manual_seed(0)).images
    """

    stock_class = DDPMPipeline
    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: UNet2DModelCustom | UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    # ------------------------------------------------------------------ sampling

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        timesteps: Sequence[int] | None = None,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Sample images.

        Args:
            batch_size: number of images.
            generator: of the noise; one for the batch, or a list of one per image, which makes an image independent
                of the batch it is in.
            num_inference_steps: length of the chain; the model's own T when left out.
            output_type: "pil" (list of images), "np" (B, H, W, C) or "pt" (B, C, H, W), the last two in [0, 1].
            return_dict: an `ImagePipelineOutput` rather than a tuple.
            timesteps: the chain itself, descending, in place of `num_inference_steps`.
            latents: x_T, (B, C, H, W), in place of drawing it.
            callback_on_step_end: called as (pipe, i, t, {"latents": x}) after each step; may return other latents.

        Raises ValueError or TypeError, before the first step, for arguments that do not fit the model.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        if output_type == "pil" and self.unet.config.in_channels not in (1, 3, 4):
            raise ValueError(
                f"output_type='pil' needs 1, 3 or 4 channels, the model has {self.unet.config.in_channels}; use 'np' or 'pt'."
            )
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may hold {self._callback_tensor_inputs}, got {sorted(unknown)}."
            )
        shape = self._check_call(batch_size, generator, latents)
        scheduler = self._chain(num_inference_steps, timesteps)
        with self.progress_bar(total=len(scheduler.timesteps)) as bar:
            for i, step in enumerate(self._denoise(scheduler, shape, generator, latents)):
                if callback_on_step_end is not None:
                    inputs = {name: step.x for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, step.t, inputs) or {}
                    step.x = changed.pop("latents", step.x)
                bar.update()
        self.maybe_free_model_hooks()
        images = self._as_output(step.x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def denoise(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        latents: torch.Tensor | None = None,
    ) -> Iterator[DenoisingStep]:
        """The reverse process as a generator: yields a `DenoisingStep` after each step; arguments as for a call.

        The U-Net is in eval mode while a step runs, and the pipeline's scheduler is left as it was.
        """
        shape = self._check_call(batch_size, generator, latents)
        return self._denoise(self._chain(num_inference_steps, timesteps), shape, generator, latents)

    def _denoise(self, scheduler, shape, generator, latents) -> Iterator[DenoisingStep]:
        device = self._execution_device
        generator = list(generator) if isinstance(generator, (list, tuple)) else generator
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        x = latents.to(device=device, dtype=torch.float32) * scheduler.init_noise_sigma
        options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        # An int spares this package's scheduler a table look-up on the device; others want their own tensors back.
        is_own = isinstance(scheduler, DDPMSchedulerCustom)
        step_timesteps = scheduler.timesteps.tolist() if is_own else scheduler.timesteps
        for t, t_model in zip(step_timesteps, scheduler.timesteps):
            with torch.no_grad(), _eval_mode(self.unet):
                model_input = scheduler.scale_model_input(x, t).to(self.unet.dtype)
                output = self.unet(model_input, t_model).sample
                # Samples stay float32 whatever the model computes in: bf16 would lose the noise at small t.
                result = scheduler.step(output.float(), t, x, **options)
            step = DenoisingStep(t, result.prev_sample, getattr(result, "pred_original_sample", None))
            yield step
            x = step.x

    def _chain(self, num_inference_steps: int | None, timesteps: Sequence[int] | None) -> SchedulerMixin:
        """A copy of the scheduler set to the chain asked for: the pipeline's own stays usable for training."""
        scheduler = copy.deepcopy(self.scheduler)
        if timesteps is not None:
            if num_inference_steps is not None:
                raise ValueError("give num_inference_steps or timesteps, not both.")
            if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
                raise ValueError(f"{type(scheduler).__name__} takes no timesteps of its own: give num_inference_steps.")
            scheduler.set_timesteps(timesteps=timesteps, device=self._execution_device)
        else:
            steps = scheduler.config.num_train_timesteps if num_inference_steps is None else num_inference_steps
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
                raise ValueError(f"num_inference_steps must be an integer of at least 1, got {steps!r}.")
            scheduler.set_timesteps(steps, device=self._execution_device)
            # At T steps diffusers' multistep solvers round two timesteps to one, and divide by zero there: all is NaN.
            # (A step of order 2 may stay where it is, and so may the last one of all.)
            sigmas = getattr(scheduler, "sigmas", None)
            if scheduler.order == 1 and sigmas is not None and (torch.as_tensor(sigmas)[:-1].diff() == 0).any():
                raise ValueError(
                    f"num_inference_steps={steps} makes {type(scheduler).__name__} visit a noise level twice: "
                    f"give fewer steps (the model has {scheduler.config.num_train_timesteps})."
                )
        return scheduler

    def _check_call(self, batch_size: int, generator: Generators, latents: torch.Tensor | None) -> tuple[int, ...]:
        """The shape of x_T, or an error that names the argument that does not fit."""
        config = self.unet.config
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
        if config.sample_size is None and latents is None:
            raise ValueError("the U-Net's configuration has no sample_size: give latents, whose size is then used.")
        size = config.sample_size if isinstance(config.sample_size, (list, tuple)) else (config.sample_size,) * 2
        shape = (batch_size, config.in_channels, *(size if config.sample_size is not None else latents.shape[2:]))
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}.")
        generators = generator if isinstance(generator, (list, tuple)) else [generator] * batch_size
        if len(generators) != batch_size:
            raise ValueError(f"generator must be one, or {batch_size} (one per image), got {len(generators)}.")
        if wrong := [g for g in generators if not isinstance(g, (torch.Generator, NoneType))]:
            raise TypeError(f"generator must be a torch.Generator or a list of them, got {wrong[0]!r}.")
        variance_type = self.scheduler.config.get("variance_type")
        expected = config.in_channels * (2 if variance_type in LEARNED_VARIANCES else 1)
        if config.out_channels != expected:
            raise ValueError(
                f"variance_type={variance_type!r} needs a U-Net with {expected} output channels, "
                f"this one has {config.out_channels}."
            )
        return shape

    def _as_output(self, x: torch.Tensor, output_type: str):
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    # ------------------------------------------------------------------ saving and loading

    def to_json_string(self) -> str:
        """model_index.json with every part under its stock name."""
        config = json.loads(super().to_json_string())
        for name, part in self.components.items():
            if isinstance(part, SavesAsStock):
                config[name] = ["diffusers", part.stock_class.__name__]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True, **kwargs) -> None:
        """Write a folder that this package and stock diffusers both load: safetensors and JSON.

        Arguments as for `DiffusionPipeline.save_pretrained`; pickled weights (`safe_serialization=False`) are refused.
        """
        refuse_pickle(safe_serialization)
        super().save_pretrained(str(save_directory), **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        unet: UNet2DModelCustom | UNet2DModel | None = None,
        scheduler: SchedulerMixin | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **model_kwargs,
    ) -> "DDPMPipelineCustom":
        """Load any DDPM pipeline of diffusers' layout, from a folder or the Hub, as this package's classes.

        Args:
            pretrained_model_name_or_path: a folder, or a repository on the Hub (`google/ddpm-cifar10-32`, say). Parts
                lie in `unet/` and `scheduler/`, or all in the root.
            unet, scheduler: used as they are in place of the saved ones.
            revision, token, cache_dir, force_download, local_files_only: as for `snapshot_download`.
            model_kwargs: `torch_dtype`, `variant`, `use_safetensors`, `device_map` and what else
                `UNet2DModelCustom.from_pretrained` takes.

        Raises FileNotFoundError for a folder that holds no pipeline; the Hub's own errors otherwise.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            try:
                folder = _snapshot(
                    str(pretrained_model_name_or_path),
                    allow_pickle=not model_kwargs.get("use_safetensors"),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                )
            except Exception as error:
                error.add_note(f"There is no folder {str(folder)!r} here, so it was looked for on the Hub.")
                raise
        name = str(pretrained_model_name_or_path)
        if scheduler is None:
            scheduler = _load_scheduler(_part_folder(folder, "scheduler", "scheduler_config.json", name))
        if unet is None:
            weights = _part_folder(folder, "unet", "config.json", name)
            if not any(weights.glob("*.safetensors")):
                model_kwargs.setdefault("use_safetensors", False)  # diffusers logs an error before it tries .bin
            unet = UNet2DModelCustom.from_pretrained(weights, **model_kwargs)
        elif model_kwargs:
            raise TypeError(f"{sorted(model_kwargs)} say how to load the U-Net, but a U-Net was given.")
        pipe = cls(unet=unet, scheduler=scheduler)
        pipe.register_to_config(_name_or_path=name)
        return pipe


class _eval_mode:
    """Puts a module in eval mode for a block of code, and back as it was."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def __enter__(self) -> None:
        self.training = [m for m in self.module.modules() if m.training]
        self.module.eval()

    def __exit__(self, *_) -> None:
        for module in self.training:
            module.training = True


def _snapshot(repo_id: str, allow_pickle: bool, **kwargs) -> Path:
    """The files of a pipeline from the Hub: configurations and safetensors, or `.bin` weights where only those are."""
    if repo_id.count("/") > 1 or repo_id.startswith((".", "/")):
        raise FileNotFoundError(f"{repo_id!r} is no folder here, nor a repository's name (user/name).")
    configs = ["model_index.json", "config.json", "scheduler_config.json", "unet/*.json", "scheduler/*.json"]
    weights = ["diffusion_pytorch_model*", "unet/diffusion_pytorch_model*"]
    safe = [pattern + ".safetensors" for pattern in weights]
    folder = Path(snapshot_download(repo_id, allow_patterns=configs + ["*.safetensors.index.json"] + safe, **kwargs))
    if allow_pickle and not any(folder.rglob("*.safetensors")):
        # Read with weights_only: no code in a pickle is executed.
        folder = Path(snapshot_download(repo_id, allow_patterns=configs + [p + ".bin" for p in weights], **kwargs))
    return folder


def _part_folder(folder: Path, part: str, config_name: str, name: str) -> Path:
    """Where a part lies in a folder; `name` is what the user calls the folder, or the repository it is a copy of."""
    for candidate in (folder / part, folder):
        if (candidate / config_name).is_file():
            return candidate
    raise FileNotFoundError(f"{name} holds no pipeline: neither {part}/{config_name} nor {config_name} is there.")


def _load_scheduler(folder: Path) -> SchedulerMixin:
    name = json.loads((folder / "scheduler_config.json").read_text()).get("_class_name", "DDPMScheduler")
    if name in ("DDPMScheduler", "DDPMSchedulerCustom"):
        return DDPMSchedulerCustom.from_pretrained(folder)
    if not hasattr(diffusers, name):
        raise ValueError(
            f"{folder / 'scheduler_config.json'} names the scheduler {name!r}, which diffusers does not have."
        )
    return getattr(diffusers, name).from_pretrained(folder)
