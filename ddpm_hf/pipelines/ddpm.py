"""DDPMPipelineCustom: sampling, saving and loading, and conversion from and to diffusers' DDPMPipeline."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import unwrap_module

from ddpm_hf.checks import check_choice
from ddpm_hf.files import check_output_folder, staging_folder
from ddpm_hf.interop import SavesAsStock, refuse_pickle
from ddpm_hf.models.onnx_unet import onnx_name
from ddpm_hf.models.unet import UNet2DModelCustom
from ddpm_hf.pipelines import loading
from ddpm_hf.pipelines.arguments import (
    Generators,
    SamplingInputs,
    check_callback,
    check_network,
    check_output_type,
    draw_noise,
    latents_of,
    prepare_inputs,
)
from ddpm_hf.pipelines.denoising import (
    DenoisingIterator,
    DenoisingStep,
    RecordedSteps,
    StepFunctions,
    denoising_loop,
)
from ddpm_hf.schedulers.compatibility import check_scheduler


class DDPMPipelineCustom(SavesAsStock, DiffusionPipeline):
    """Image generation with a DDPM, unconditional or class-conditional.

    Args:
        unet: the network, `UNet2DModelCustom` or diffusers' `UNet2DModel`.
        scheduler: `DDPMSchedulerCustom`, `DDIMSchedulerCustom` or a diffusers scheduler that can run the model. The model is taken to be
            trained with its betas; another scheduler assigned later must have the same.

    Example:
        >>> pipe = DDPMPipelineCustom.from_pretrained("outputs/digits")
        >>> images = pipe(batch_size=16, seed=0).images

    Image editing (image to image, interpolation, inpainting, denoising) is in `ddpm_hf.pipelines.editing`, DDIM
    inversion in `ddpm_hf.pipelines.inversion`.
    """

    stock_class = DDPMPipeline
    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: UNet2DModelCustom | UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        check_network(unet)
        check_scheduler(scheduler)
        self.register_modules(unet=unet, scheduler=scheduler)
        self._trained_T = scheduler.config.num_train_timesteps
        self._trained_alphas_cumprod = scheduler.alphas_cumprod.cpu()
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
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **options,
    ) -> ImagePipelineOutput | tuple:
        """Sample images.

        Args:
            batch_size: number of images. With `seeds` it may be left out.
            generator: of the noise, one for the batch or a list of one per image. With a list an image does not
                depend on the others in its batch.
            num_inference_steps: number of sampling steps. None: those that the model was distilled to, or its T.
            output_type: "pil" (list of images), "np" (B, H, W, C) or "pt" (B, C, H, W), the last two in [0, 1].
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as (pipe, i, t, {"latents": x}) after each step; may return new latents.
            callback_on_step_end_tensor_inputs: which tensors the callback is given.
            timesteps: the timesteps themselves, descending, instead of `num_inference_steps`.
            latents: x_T, (B, C, H, W), instead of drawing it.
            class_labels: one label for all images, or one per image; required by class-conditional models.
            guidance_scale: of classifier-free guidance, which needs a model with a null class; 1 (default): none.
            null_class: the label that means "no class", if the network's configuration does not record it
                (`ddpm_hf.pipelines.guidance.mark_null_class`).
            guidance: fn(x_0, t), the log-probability of each image, (B,), or their sum: a function whose gradient steers
                the samples (`ddpm_hf.pipelines.function_guidance`). Minus a loss is one; its weight is a factor in fn.
            guidance_gradient: of what the gradient is taken: "network" (default), the predicted x_0 with the network
                before it; "estimate", the predicted x_0 alone, which is faster; "x_t", the noisy image, which fn is then
                given in place of x_0.
            eta: amount of noise per step, 0 (none) to 1 (that of DDPM), for schedulers that take it, such as DDIM.
            seeds: one seed per image, instead of a generator: each gives its image 0.
            seed, first_index: instead of a generator: images first_index (default 0), first_index + 1, ... of this
                seed. An image is the same in any batch and on any number of processes.

        Raises ValueError or TypeError, before the first step, for arguments that do not fit the model. Raises ValueError
        after the last step if samples are NaN or infinite, naming the images and the step at which that began.
        """
        check_output_type(output_type, self.unet.config.in_channels)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        steps, recorded = self.denoise(batch_size, generator, num_inference_steps, **options), RecordedSteps()
        with self.progress_bar(total=len(steps)) as bar:
            for i, step in enumerate(steps):
                if callback_on_step_end is not None:
                    inputs = {name: step.x for name in callback_on_step_end_tensor_inputs}
                    step.x = latents_of(callback_on_step_end(self, i, step.t, inputs), step.x)
                recorded.add(step.t, step.x)
                bar.update()
        images = self.to_images(step.x, output_type, recorded)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_inputs(self, *args, output_type: str = "pil", **options) -> None:
        """Check the arguments of `denoise`, and `output_type`, without sampling. Errors are those of `__call__`."""
        check_output_type(output_type, self.unet.config.in_channels)
        prepare_inputs(self, *args, **options)

    def denoise(
        self, batch_size: int = 1, generator: Generators = None, num_inference_steps: int | None = None, **options
    ) -> DenoisingIterator:
        """Sample step by step: an iterator that yields a `DenoisingStep` after each step; `len()` is their number.

        Arguments and errors are those of `__call__`; errors are raised here, not at the first step. Samples may be NaN or
        infinite. The U-Net is in eval mode while a step runs, and the pipeline's scheduler is not changed.
        """
        inputs = prepare_inputs(self, batch_size, generator, num_inference_steps, **options)
        return DenoisingIterator(self.denoise_inputs(inputs), len(inputs.scheduler.timesteps))

    def denoise_inputs(self, inputs: SamplingInputs) -> Iterator[DenoisingStep]:
        """`denoise` with arguments that are checked and prepared."""
        x = draw_noise(self, inputs.shape, inputs.generator) if inputs.latents is None else inputs.latents
        x = x.to(self._execution_device, torch.float32) * inputs.scheduler.init_noise_sigma
        try:
            yield from denoising_loop(inputs, x, self._step_functions)
        finally:
            self.maybe_free_model_hooks()

    def to_images(self, x: torch.Tensor, output_type: str = "pil", recorded: RecordedSteps | None = None):
        """Convert x, (B, C, H, W) in [-1, 1] and clamped to that, to the images that a call returns.

        Raises ValueError if x is NaN or infinite; the message says at which step that began if the steps are `recorded`.
        """
        check_output_type(output_type, x.shape[1])
        (recorded or RecordedSteps()).check_finite(x)
        images = (x.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    def compile(self, **options) -> None:
        """Compile a sampling step: network, guidance and scheduler in one graph, with only the noise drawn outside.

        With a scheduler of diffusers, network and guidance are compiled. Images stay the same up to rounding.
        `options` are those of `torch.compile`, such as `mode="reduce-overhead"` for CUDA graphs.
        """
        loading.check_has_weights(self.unet, "compile()")
        self._step_functions = StepFunctions.compiled(**{"fullgraph": True, "dynamic": False, **options})

    # ------------------------------------------------------------------ conversion from and to diffusers

    def to_diffusers(self) -> DDPMPipeline:
        """A diffusers pipeline with the same weights, not a copy: training or moving one trains or moves both.

        This package's schedulers become those of diffusers; others are kept. The network is not compiled. Raises
        NotImplementedError for what diffusers cannot express (analytic variance).
        """
        unet = loading.convert_unet(self.unet, UNet2DModel)
        return DDPMPipeline(unet, loading.to_stock_scheduler(self.scheduler))

    @classmethod
    def from_diffusers(cls, stock: DiffusionPipeline) -> "DDPMPipelineCustom":
        """The counterpart of `to_diffusers`, for any pipeline with a `unet` and a `scheduler`: same weights, no copy."""
        unet = loading.convert_unet(stock.unet, UNet2DModelCustom)
        return cls(unet, loading.to_own_scheduler(stock.scheduler))

    # ------------------------------------------------------------------ saving and loading

    def to_json_string(self) -> str:
        """The content of model_index.json, which names each component's stock class."""
        config = json.loads(super().to_json_string())
        for name, component in self.components.items():
            component = unwrap_module(component)
            if isinstance(component, SavesAsStock):
                config[name] = ["diffusers", component.stock_class.__name__]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True, **kwargs) -> None:
        """Write a folder of safetensors and JSON files that both this package and diffusers load.

        Arguments are those of `DiffusionPipeline.save_pretrained`; pickled weights (`safe_serialization=False`) are
        refused. Files appear in the folder only when all of them are written. Other files in it are kept.
        Raises ValueError if `save_directory` cannot be a folder with these files.
        """
        refuse_pickle(safe_serialization)
        loading.check_has_weights(self.unet, "save_pretrained()")
        folder = Path(save_directory)
        check_output_folder("save_directory", folder.resolve(), ["model_index.json"], self.components)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.absolute().name)
        with staging_folder(folder) as staged:
            super().save_pretrained(str(staged), **kwargs)
            loading.move_saved(staged, folder.resolve(), kwargs.get("variant"))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        unet: UNet2DModelCustom | UNet2DModel | None = None,
        scheduler: SchedulerMixin | None = None,
        backend: str = "torch",
        **kwargs,
    ) -> "DDPMPipelineCustom":
        """Load a DDPM pipeline saved by this package or diffusers, from a folder or the Hub, as this package's classes.

        Args:
            pretrained_model_name_or_path: a folder, or a repository on the Hub (`google/ddpm-cifar10-32`, say). The
                components are in `unet/` and `scheduler/`, or all in the root.
            unet, scheduler: used instead of the saved ones.
            backend: what computes the network: "torch", or "onnxruntime" for the file onnx/model.onnx that `ddpm-export`
                writes (`variant="fp16"`: onnx/model_fp16.onnx), on the CPU. No network of PyTorch is loaded then.
            revision, token, cache_dir, force_download, local_files_only: as for
                `huggingface_hub.snapshot_download`.
            kwargs: other options of `UNet2DModelCustom.from_pretrained`: `torch_dtype`, `variant`, `use_safetensors`,
                `device_map`, ..., or arguments of `UNet2DModelCustom` that replace the saved ones.

        Raises TypeError for options that are none of these, FileNotFoundError for a folder without a pipeline and for what
        is not on the Hub, PermissionError for a repository that may not be read, ConnectionError without a network,
        TimeoutError for a Hub that does not answer, OSError for files damaged in transit and answers that are not the Hub's.
        """
        name = str(pretrained_model_name_or_path)
        folder = Path(name)
        download_options = {option: kwargs.pop(option) for option in loading.DOWNLOAD_OPTIONS if option in kwargs}
        loading.check_options(kwargs)
        check_choice("backend", backend, ("torch", "onnxruntime"))
        if backend == "onnxruntime":
            return cls._from_onnx(name, unet, scheduler, kwargs, download_options)
        if unet is not None and kwargs:
            raise TypeError(f"{sorted(kwargs)} are options for loading the U-Net, but unet was given.")
        if not folder.is_dir():
            folder = loading.download_pipeline(name, allow_pickle=not kwargs.get("use_safetensors"), **download_options)
        loading.check_model_index(folder, [n for n, part in (("unet", unet), ("scheduler", scheduler)) if part is None])
        pipe = cls(
            scheduler=loading.load_scheduler(folder, name) if scheduler is None else scheduler,
            unet=loading.load_unet(folder, name, **kwargs) if unet is None else unet,
        )
        if unet is None:
            pipe._trained_T = loading.saved_num_train_timesteps(folder) or pipe._trained_T
        pipe.register_to_config(_name_or_path=name)
        return pipe

    @classmethod
    def _from_onnx(cls, name: str, unet, scheduler, options: dict, download_options: dict) -> "DDPMPipelineCustom":
        variant = options.pop("variant", None)
        if given := ["unet"] * (unet is not None) + sorted(options):
            raise TypeError(f"{given[0]} is for a network of PyTorch, and cannot be given with backend='onnxruntime'.")
        folder = Path(name)
        if not folder.is_dir():
            folder = loading.download_pipeline(name, False, onnx_name(variant), **download_options)
        unet, saved = loading.load_onnx(folder, variant)
        pipe = cls(unet, saved if scheduler is None else scheduler)
        pipe._trained_T = saved.config.num_train_timesteps
        pipe.register_to_config(_name_or_path=name)
        return pipe
