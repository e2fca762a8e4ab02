"""DDPMPipelineCustom: from noise to images, and in and out of the Hub."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

from ddpm_hf.interop import SavesAsStock, refuse_pickle
from ddpm_hf.models.unet import UNet2DModelCustom
from ddpm_hf.pipelines.arguments import (
    Generators,
    check_batch,
    check_output_type,
    check_scheduler,
    check_shape,
    make_chain,
    step_options,
)
from ddpm_hf.pipelines.denoising import DenoisingStep, StepFunctions, Steps, compiled_step_functions, reverse_process
from ddpm_hf.pipelines.guidance import Labels, make_denoiser
from ddpm_hf.pipelines.loading import (
    load_scheduler,
    part_folder,
    replace_save,
    saved_T,
    scheduler_as,
    snapshot,
    unet_as,
)
from ddpm_hf.schedulers.ddpm import DDPMSchedulerCustom


class DDPMPipelineCustom(SavesAsStock, DiffusionPipeline):
    """Image generation with a DDPM, unconditional or by class.

    Args:
        unet: the noise predictor, `UNet2DModelCustom` or diffusers' `UNet2DModel`.
        scheduler: `DDPMSchedulerCustom` or a diffusers scheduler that can run the model. The length T of its chain
            is taken for the one the model was trained on: a scheduler put in its place later must have the same.

    Example:
        >>> pipe = DDPMPipelineCustom.from_pretrained("outputs/digits")
        >>> images = pipe(batch_size=16, seed=0).images

    What else can be done with a trained model (inpainting, interpolation, inversion, ...) is in `ddpm_hf.pipelines.editing` and `ddpm_hf.pipelines.inversion`.
    """

    stock_class = DDPMPipeline
    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: UNet2DModelCustom | UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self._trained_T = scheduler.config.num_train_timesteps
        self._step_functions = StepFunctions()

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
        class_labels: Labels = None,
        guidance_scale: float = 1.0,
        null_class: int | None = None,
        eta: float | None = None,
        seeds: Sequence[int] | None = None,
        seed: int | None = None,
        first_index: int = 0,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Sample images.

        Args:
            batch_size: number of images (of `seeds`, as many as there are).
            generator: of the noise; one for the batch, or a list of one per image, which makes an image independent
                of the batch it is in.
            num_inference_steps: length of the chain; the model's own T when left out.
            output_type: "pil" (list of images), "np" (B, H, W, C) or "pt" (B, C, H, W), the last two in [0, 1].
            return_dict: an `ImagePipelineOutput` rather than a tuple.
            timesteps: the chain itself, descending, in place of `num_inference_steps`.
            latents: x_T, (B, C, H, W), in place of drawing it.
            class_labels: one for all, or one per image; for a class-conditional model, which needs them.
            guidance_scale: of classifier-free guidance; 1 is none. Needs a model with a null class.
            null_class: the label that stands for no class, for a network whose configuration does not name it
                (`ddpm_hf.pipelines.guidance.mark_null_class`).
            eta: for schedulers whose step takes it, as DDIM: the noise of a step, 0 none, 1 that of DDPM.
            seeds: one per image, in place of a generator: image 0 of each of these seeds.
            seed, first_index: in place of a generator: images first_index, first_index + 1, ... of this seed. An
                image is the same in any batch and on any number of processes.
            callback_on_step_end: called as (pipe, i, t, {"latents": x}) after each step; may return other latents.

        Raises ValueError or TypeError, before the first step, for arguments that do not fit the model.
        """
        check_output_type(output_type, self.unet.config.in_channels)
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may hold {self._callback_tensor_inputs}, got {sorted(unknown)}."
            )
        steps = self.denoise(
            batch_size,
            generator,
            num_inference_steps,
            timesteps=timesteps,
            latents=latents,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            null_class=null_class,
            eta=eta,
            seeds=seeds,
            seed=seed,
            first_index=first_index,
        )
        with self.progress_bar(total=len(steps)) as bar:
            for i, step in enumerate(steps):
                if callback_on_step_end is not None:
                    inputs = {name: step.x for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, step.t, inputs) or {}
                    step.x = changed.pop("latents", step.x)
                bar.update()
        images = self.to_images(step.x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def denoise(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        latents: torch.Tensor | None = None,
        class_labels: Labels = None,
        guidance_scale: float = 1.0,
        null_class: int | None = None,
        eta: float | None = None,
        seeds: Sequence[int] | None = None,
        seed: int | None = None,
        first_index: int = 0,
    ) -> "Steps":
        """The reverse process as an iterator: yields a `DenoisingStep` after each step, `len()` of them; arguments
        and errors as for a call, the errors at once.

        The U-Net is in eval mode while a step runs, and the pipeline's scheduler is left as it was.
        """
        batch_size, generator = check_batch(batch_size, generator, seeds, seed, first_index)
        shape = check_shape(self.unet, batch_size, latents)
        check_scheduler(self.unet, self.scheduler, self._trained_T)
        device = self._execution_device
        denoiser = make_denoiser(self.unet, batch_size, device, class_labels, guidance_scale, null_class)
        options = step_options(self.scheduler, generator, eta)
        scheduler = make_chain(self.scheduler, num_inference_steps, timesteps, device)
        return Steps(self._denoise(denoiser, scheduler, shape, generator, latents, options), len(scheduler.timesteps))

    def _denoise(self, denoiser, scheduler, shape, generator, latents, options) -> Iterator[DenoisingStep]:
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        x = latents.to(device=device, dtype=torch.float32) * scheduler.init_noise_sigma
        try:
            yield from reverse_process(denoiser, scheduler, x, generator, options, self._step_functions)
        finally:
            self.maybe_free_model_hooks()

    def to_images(self, x: torch.Tensor, output_type: str = "pil"):
        """Images (B, C, H, W) in [-1, 1] as `output_type` says: what a call returns; values outside are clamped."""
        check_output_type(output_type, x.shape[1])
        images = (x.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    def compile(self, **options) -> None:
        """Compile the reverse step, network, guidance and scheduler in one graph; `options` are `torch.compile`'s,
        such as `mode="reduce-overhead"` for CUDA graphs. Only noise is drawn outside. Of schedulers that are
        diffusers' own the network and its guidance are compiled. The images stay the same up to rounding.
        """
        self._step_functions = compiled_step_functions({"fullgraph": True, "dynamic": False, **options})

    # ------------------------------------------------------------------ in and out of diffusers

    def to_diffusers(self) -> DDPMPipeline:
        """Stock's pipeline around the same weights: not a copy, training or moving one is training or moving both.

        A scheduler of this package becomes stock's; others are handed on. Raises NotImplementedError for what stock
        cannot express (analytic variance).
        """
        return DDPMPipeline(unet_as(UNet2DModel, self.unet), scheduler_as(DDPMScheduler, self.scheduler))

    @classmethod
    def from_diffusers(cls, stock: DiffusionPipeline) -> "DDPMPipelineCustom":
        """This package's pipeline around the weights of a stock one (anything with a `unet` and a `scheduler`): not
        a copy, see `to_diffusers`."""
        return cls(
            unet_as(UNet2DModelCustom, stock.unet),
            scheduler_as(DDPMSchedulerCustom, stock.scheduler),
        )

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
        It is written beside its place and moved there whole; other files of an existing folder stay.
        """
        refuse_pickle(safe_serialization)
        folder = Path(save_directory)
        beside = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(beside, ignore_errors=True)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        try:
            super().save_pretrained(str(beside), **kwargs)
            replace_save(beside, folder, kwargs.get("variant"))
        finally:
            shutil.rmtree(beside, ignore_errors=True)

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

        Raises FileNotFoundError for a folder that holds no pipeline, and for what is not on the Hub; PermissionError
        for what may not be read; ConnectionError without a network; OSError for files that arrive damaged.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            try:
                folder = snapshot(
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
            scheduler = load_scheduler(part_folder(folder, "scheduler", "scheduler_config.json", name))
        is_saved_unet = unet is None
        if is_saved_unet:
            weights = part_folder(folder, "unet", "config.json", name)
            if not any(weights.glob("*.safetensors")):
                model_kwargs.setdefault("use_safetensors", False)  # diffusers logs an error before it tries .bin
            unet = UNet2DModelCustom.from_pretrained(weights, **model_kwargs)
        elif model_kwargs:
            raise TypeError(f"{sorted(model_kwargs)} say how to load the U-Net, but a U-Net was given.")
        pipe = cls(unet=unet, scheduler=scheduler)
        if is_saved_unet:
            pipe._trained_T = saved_T(folder) or pipe._trained_T
        pipe.register_to_config(_name_or_path=name)
        return pipe
