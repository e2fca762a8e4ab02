"""A Gradio app for a pipeline: sampling step by step, editing, and interpolation. `ddpm-demo` opens it."""

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageChops

from ddpm_hf.models.builders import image_size
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.editing import image_to_image, inpaint
from ddpm_hf.pipelines.grids import image_grid
from ddpm_hf.pipelines.guidance import class_names_of, cycled_labels, null_class_of
from ddpm_hf.pipelines.inversion import interpolate_seeds
from ddpm_hf.schedulers.samplers import SAMPLERS, make_sampler, recommended_sampler

if TYPE_CHECKING:
    import gradio

MAX_IMAGES, MAX_STEPS, MAX_WAITING, SHOWN_PIXELS = 16, 250, 20, 512
SECONDS_BETWEEN_PICTURES = 0.1
EACH = "each class in turn"
# Of all functions together: they share the pipeline.
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}
INSTALL = "pip install ddpm_hf[demo]"


def make_app(pipe: DDPMPipelineCustom, name: str) -> "gradio.Blocks":
    """The app, with its queue: one call is computed at a time, and at most `MAX_WAITING` wait.

    Args:
        pipe: an unconditional pipeline, or one with a table of classes.
        name: of the model, for the title.

    Raises ImportError without gradio, and ValueError for other conditions than classes and for images without a size.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError(f"the demo needs gradio, which is not installed: {INSTALL}") from error
    model = Model(pipe)
    about = "A denoising diffusion model, by `ddpm_hf`. An image depends on its seed and its settings alone."
    with gr.Blocks(title=f"{name}: a DDPM", analytics_enabled=False) as app:
        gr.Markdown(f"# {name}\n{about}")
        with gr.Tab("Sample"):
            _sample_tab(gr, model)
        with gr.Tab("Edit"):
            _edit_tab(gr, model)
        with gr.Tab("Between two seeds"):
            _interpolation_tab(gr, model)
    return app.queue(max_size=MAX_WAITING)


class Model:
    """What the app computes, as functions of what its controls hold. Errors are ValueError and TypeError."""

    def __init__(self, pipe: DDPMPipelineCustom):
        config, T = pipe.unet.config, pipe.scheduler.config.num_train_timesteps
        if config.class_embed_type is not None:
            raise ValueError(f"the demo is for classes, got a model with class_embed_type={config.class_embed_type!r}.")
        if image_size(config) is None:
            raise ValueError("the demo needs a model whose configuration has a sample_size.")
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.max_steps = pipe, min(T, MAX_STEPS)
        self.scale = max(1, SHOWN_PIXELS // 4 // max(image_size(config)))
        labels = cycled_labels(pipe.unet, range(config.num_class_embeds or 0))
        names = class_names_of(pipe.unet)
        self.labels = {} if not labels else {names[k] if names else str(k): k for k in sorted(set(labels))}
        self.is_guided = null_class_of(pipe.unet) is not None
        self.sampler, self.steps = recommended_sampler(pipe.scheduler)

    def condition(self, label: str | None, guidance: float, number: int) -> dict[str, Any]:
        """The arguments of a pipeline call for a label of the list and a guidance scale."""
        if not self.labels:
            return {}
        labels = cycled_labels(self.pipe.unet, range(number))
        return {
            "class_labels": labels if label in (None, EACH) else self.labels[label],
            "guidance_scale": guidance if self.is_guided else 1.0,
        }

    def with_sampler(self, sampler: str) -> DDPMPipelineCustom:
        pipe = DDPMPipelineCustom(self.pipe.unet, make_sampler(sampler, self.pipe.scheduler))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def grid(self, images) -> Image.Image:
        return image_grid(images, scale=self.scale, padding=2)

    def sample(
        self, number: int, label: str | None, guidance: float, sampler: str, steps: int, seed: int
    ) -> Iterator[tuple[Image.Image, str]]:
        """Pictures of the images as they form, the last of them finished, and what is shown."""
        pipe, shown = self.with_sampler(sampler), 0.0
        options = {"seed": int(seed), "num_inference_steps": int(steps)} | self.condition(label, guidance, int(number))
        chain = pipe.denoise(int(number), **options)
        for i, step in enumerate(chain, start=1):
            if i < len(chain) and time.monotonic() - shown > SECONDS_BETWEEN_PICTURES:
                shown = time.monotonic()
                yield self.grid(pipe.to_images(step.x)), f"step {i} of {len(chain)}, t = {float(step.t):g}"
        yield (
            self.grid(pipe.to_images(step.x)),
            f"{int(number)} images, seed {int(seed)}, {len(chain)} steps of {sampler}",
        )

    def example(self, label: str | None, guidance: float, seed: int) -> Image.Image:
        """One image of the model, large enough to paint on."""
        *_, (picture, _) = self.sample(1, label, guidance, self.sampler, self.steps, seed)
        return picture

    def change(self, editor: dict | None, strength: float, label: str | None, guidance: float, number: int, seed: int):
        """Image to image: other images like the one in the editor."""
        picture = _background(editor)
        options = {"strength": strength, "num_inference_steps": self.max_steps, "seed": int(seed)}
        options |= self.condition(label, guidance, int(number))
        return self.grid(image_to_image(self.pipe, [picture] * int(number), **options))

    def fill(self, editor: dict | None, steps: int, label: str | None, guidance: float, number: int, seed: int):
        """Inpainting: what is painted over in the editor is filled in."""
        picture, mask = _background(editor), _painted(editor)
        options = {"num_inference_steps": int(steps), "jump_n_sample": 3, "seed": int(seed)}
        options |= self.condition(label, guidance, int(number))
        return self.grid(inpaint(self.pipe, [picture] * int(number), mask, **options))

    def between(self, seed: int, other: int, number: int, label: str | None, guidance: float, steps: int):
        """Images by DDIM from latents between those of two seeds."""
        weights = np.linspace(0, 1, int(number)).tolist()
        options = self.condition(label, guidance, len(weights))
        images = interpolate_seeds(self.pipe, int(seed), int(other), weights, int(steps), **options)
        return image_grid(images, len(images), scale=self.scale, padding=2)


def _background(editor: dict | None) -> Image.Image:
    if editor is None or editor["background"] is None:
        raise ValueError("give an image first: upload one, or paste it.")
    return editor["background"].convert("RGB")


def _painted(editor: dict) -> Image.Image:
    """White where something is painted on the image."""
    strokes = [layer.getchannel("A") for layer in editor["layers"] if layer.mode == "RGBA"]
    if not strokes or not any(stroke.getbbox() for stroke in strokes):
        raise ValueError("paint over the part of the image that is to be filled in.")
    return functools.reduce(ImageChops.lighter, strokes).point(lambda alpha: 255 if alpha > 127 else 0)


# ---------------------------------------------------------------------- controls


def _explained(gr, function: Callable) -> Callable:
    """The function with ValueError and TypeError shown as messages."""

    @functools.wraps(function)
    def call(*arguments):
        try:
            return function(*arguments)
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    @functools.wraps(function)
    def iterate(*arguments):
        try:
            yield from function(*arguments)
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return iterate if inspect.isgeneratorfunction(function) else call


def _condition_controls(gr, model: Model, several: bool = False) -> tuple:
    """Class and guidance scale; hidden where the model has none. If `several`, images of one call may differ in class."""
    choices = [EACH] * several + list(model.labels)
    label = gr.Dropdown(choices, value=next(iter(choices), None), label="class", visible=bool(model.labels))
    guidance = gr.Slider(0, 5, 1.0, step=0.1, label="guidance scale (1: none)", visible=model.is_guided)
    return label, guidance


def _sample_tab(gr, model: Model) -> None:
    with gr.Row():
        with gr.Column():
            number = gr.Slider(1, MAX_IMAGES, min(10, MAX_IMAGES), step=1, label="number of images")
            label, guidance = _condition_controls(gr, model, several=True)
            sampler = gr.Dropdown(list(SAMPLERS), value=model.sampler, label="sampler")
            steps = gr.Slider(1, model.max_steps, model.steps, step=1, label="steps")
            seed = gr.Number(0, label="seed", precision=0, minimum=0)
            button, stop = gr.Button("Sample", variant="primary"), gr.Button("Stop")
        with gr.Column(scale=2):
            picture = gr.Image(label="images", show_label=False, format="png", interactive=False)
            status = gr.Textbox(label="step", interactive=False)
    inputs = [number, label, guidance, sampler, steps, seed]
    running = button.click(_explained(gr, model.sample), inputs, [picture, status], api_name="sample", **ONE_AT_A_TIME)
    stop.click(None, cancels=[running])


def _edit_tab(gr, model: Model) -> None:
    with gr.Row():
        with gr.Column():
            brush = gr.Brush(3 * model.scale, colors=["#ff0000"], color_mode="fixed")
            editor = gr.ImageEditor(
                label="image", type="pil", format="png", image_mode="RGBA", layers=False, brush=brush, transforms=()
            )
            gr.Markdown("Upload an image, or take one of the model. Paint over what is to be filled in.")
            example = gr.Button("An image of the model")
            label, guidance = _condition_controls(gr, model)
            number = gr.Slider(1, MAX_IMAGES, 4, step=1, label="number of results")
            seed = gr.Number(0, label="seed", precision=0, minimum=0)
            strength = gr.Slider(0.05, 1, 0.5, step=0.05, label="strength of a change")
            steps = gr.Slider(1, model.max_steps, min(50, model.max_steps), step=1, label="steps of filling in")
            change, fill = gr.Button("Change the whole image"), gr.Button("Fill in what is painted over")
        with gr.Column():
            picture = gr.Image(label="results", show_label=False, format="png", interactive=False)
    common = [label, guidance, number, seed]
    example.click(_explained(gr, model.example), [label, guidance, seed], editor, api_name="example", **ONE_AT_A_TIME)
    change.click(
        _explained(gr, model.change), [editor, strength, *common], picture, api_name="image_to_image", **ONE_AT_A_TIME
    )
    fill.click(_explained(gr, model.fill), [editor, steps, *common], picture, api_name="inpaint", **ONE_AT_A_TIME)


def _interpolation_tab(gr, model: Model) -> None:
    with gr.Row():
        seed, other = (gr.Number(k, label=f"seed {k + 1}", precision=0, minimum=0) for k in range(2))
        number = gr.Slider(2, MAX_IMAGES, 8, step=1, label="number of images")
        steps = gr.Slider(1, model.max_steps, model.steps, step=1, label="steps of DDIM")
    label, guidance = _condition_controls(gr, model)
    button = gr.Button("Interpolate", variant="primary")
    picture = gr.Image(label="images", show_label=False, format="png", interactive=False)
    inputs = [seed, other, number, label, guidance, steps]
    button.click(_explained(gr, model.between), inputs, picture, api_name="interpolate", **ONE_AT_A_TIME)
