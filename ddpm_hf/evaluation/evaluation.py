"""Evaluate a model: its bound, its samples by one or more samplers, and how close they are to training images."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from accelerate import PartialState

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, GaussianDiffusion
from ddpm_hf.data.images import Images
from ddpm_hf.diffusion.likelihood import VariationalBound
from ddpm_hf.evaluation import bounds, features, measures, plots
from ddpm_hf.evaluation.distances import Distances, closest_to_training
from ddpm_hf.evaluation.options import EvaluationOptions, Sampler, samplers_of
from ddpm_hf.evaluation.references import read_reference, write_reference
from ddpm_hf.evaluation.sample_files import read_samples
from ddpm_hf.models.builders import image_size
from ddpm_hf.pipelines.denoising import NonFiniteSamples
from ddpm_hf.pipelines.guidance import count_classes, cycled_labels
from ddpm_hf.schedulers.samplers import as_ddpm, default_steps, make_sampler

PIXELS_ALONE = "the bound and distances in pixels can be measured without them"


class Evaluation:
    """The measurements of one model. Errors in the options are raised by `__init__`, before any work.

    Args:
        options: checked by `check_options`.
        pipe: the model's pipeline, on the device to compute on.
        run: the content of the model's config.yaml; {} for none.
        weights: how the weights were averaged; None if that is not known.

    Attributes:
        result: "evaluation" in metrics.json, as far as it is measured.
        pictures: PNG files by their names.
        problem: why there are no distances, or None.
    """

    def __init__(self, options: EvaluationOptions, pipe: DDPMPipelineCustom, run: dict, weights: str | None):
        self.options, self.pipe, self.run, self.weights = options, pipe, run, weights
        self.state, self.problem, self.pictures = PartialState(), None, {}
        self._distilled_steps = default_steps(pipe.scheduler)
        self.samplers = samplers_of(options, self._distilled_steps)
        self._schedulers = {(None, None): pipe.scheduler}
        for sampler in self.samplers:
            self._check(sampler)
        self.backbone = self._load_backbone()
        dim = None if self.backbone is None else self.backbone.dim
        self.reference = None if options.reference is None else read_reference(options.reference, dim)
        self.training = self.validation = self.validation_split = self.samples = None
        if options.dataset is not None:
            splits = (options.split, options.validation_split)
            self.training, self.validation, self.validation_split = measures.real_images(self._open, run, *splits)
            if self.validation is None:
                self.state.print(
                    "There are no validation images: their bound, best timesteps and memorization are left out."
                )
        config = pipe.unet.config
        if options.samples is not None and options.features != "none":
            count = options.num_samples or 500
            self.samples = read_samples(options.samples, count, image_size(config), config.in_channels)
        self.result = {
            "protocol": None,
            "dataset": _public_name(options.dataset or options.reference),
            "bits_per_dim": {},
            "best_timesteps": None,
            "figures": [],
            "memorization": {},
            "samplers": None,
        }

    def _open(self, split: str) -> Images:
        return measures.open_images(self.options, self.pipe.unet.config, self.run, split)

    def _load_backbone(self) -> features.Backbone | None:
        """None if no features are asked for, there are none for these images, or they cannot be loaded (`problem`)."""
        name, channels = self.options.features, self.pipe.unet.config.in_channels
        if name == "none":
            return None
        if channels not in (1, 3):
            problem = f"images of {channels} channels have no features: {PIXELS_ALONE}"
            if name or self.options.reference or self.options.save_reference:
                raise ValueError(f"{problem}.")
            self.state.print(f"{problem[0].upper()}{problem[1:]}.")
            return None
        try:
            return features.load_backbone(name or features.default_features(self.options.dataset), self.state.device)
        except (ValueError, OSError) as error:
            self.problem = f"no distances, because the features cannot be loaded: {error}"
            self.state.print(f"There will be {self.problem}")
            return None

    def _check(self, sampler: Sampler) -> None:
        """Raise ValueError for a scheduler that cannot sample from the model in this number of steps."""
        # Of any variance: it does not change which numbers are possible, and moments would have to be measured.
        self._use(sampler._replace(variance_type=None))
        unet = self.pipe.unet
        if unet.config.class_embed_type is None:  # otherwise the conditions are in the data set
            labels = cycled_labels(unet, range(1))
            self.pipe.check_inputs(1, None, sampler.steps, class_labels=labels, output_type="np")

    def _use(self, sampler: Sampler) -> DDPMSchedulerCustom:
        """Give the pipeline the scheduler of a sampler. Returns the chain of ancestral sampling with its variance."""
        name, variance = key = (sampler.scheduler, sampler.variance_type)
        if key not in self._schedulers:
            scheduler, options = self._schedulers[None, None], self.options
            scheduler = scheduler if name is None else make_sampler(name, scheduler)
            if variance is not None:
                images = (self.training, options.analytic_images, options.seed)
                scheduler = bounds.with_variance(self.pipe, as_ddpm(scheduler), variance, *images)
            self._schedulers[key] = scheduler
        self.pipe.scheduler = self._schedulers[key]
        return as_ddpm(self.pipe.scheduler)

    # ------------------------------------------------------------------ the bound

    def measure_bounds(self) -> None:
        """The bounds of the first sampler's chain, which need neither features nor samples, and their picture."""
        first = self.samplers[0]
        ddpm = self._use(first)
        self.result["protocol"] = self._protocol(first.steps) | {"num_samples": 0}
        if self.training is None:
            return
        if self._distilled_steps is not None:
            self.state.print("A distilled model has no bound: its network knows the timesteps of its own steps alone.")
            return
        steps = [s.steps for s in self.samplers if s.variance_type == first.variance_type and s.is_ancestral]
        steps = list(dict.fromkeys([first.steps, *steps]))
        found, table = bounds.measure_bounds(self._bound, ddpm, self.training, self.validation, steps)
        self.result |= {"bits_per_dim": {k: asdict(v) for k, v in found.items()}, "best_timesteps": table}
        self.pictures["bound.png"] = plots.figure_bytes(plots.bound_by_timestep(found))

    def _bound(self, chain: GaussianDiffusion, images: Images, purpose: str) -> VariationalBound:
        options, T = self.options, self.pipe.scheduler.config.num_train_timesteps
        stride = options.bound_stride if len(chain) == T else 1
        values = (options.bound_images, stride, options.seed, purpose, options.batch_size)
        return bounds.measure_bound(self.pipe, chain, images, *values)

    def _bound_of(self, sampler: Sampler) -> dict:
        """The columns of the bound in the table of samplers."""
        if not sampler.is_ancestral or self.validation is None:
            return {"bits_per_dim": None, "standard_error": None}
        known = self.result["bits_per_dim"].get(f"validation, {sampler.steps} steps")
        if known is None or sampler.variance_type != self.samplers[0].variance_type:
            chain = bounds.evenly_spaced(as_ddpm(self.pipe.scheduler), sampler.steps)
            known = asdict(self._bound(chain, self.validation, "validation bound"))
        return {name: known[name] for name in ("bits_per_dim", "standard_error")}

    # ------------------------------------------------------------------ distances

    def measure_samples(self) -> Iterator[None]:
        """The distances of samples, of one sampler after the other. Yields when those of one are complete."""
        options, rows = self.options, []
        if options.features == "none" or self.problem is not None:
            return
        distances = None if self.backbone is None else self._distances()
        for sampler in self.samplers:
            self._use(sampler)
            row = {"scheduler": sampler.scheduler or type(self.pipe.scheduler).__name__}
            row |= {"variance_type": sampler.variance_type, "steps": sampler.steps, **self._bound_of(sampler)}
            try:
                figures = self._measure(sampler, distances, is_first=not rows)
            except NonFiniteSamples as error:
                if len(self.samplers) == 1:
                    raise
                self.state.print(f"{row['scheduler']}, {sampler.steps} steps: {error}")
                row, figures = row | {"problem": "samples are not finite"}, []
            rows.append(row | {"figures": {figure["name"]: figure["value"] for figure in figures}})
            if len(self.samplers) > 1:
                names = dict.fromkeys(name for row in rows for name in row["figures"])
                self.result["samplers"] = {"figures": list(names), "rows": rows}
            yield

    @property
    def _repeats_gray(self) -> bool:
        return self.pipe.unet.config.in_channels == 1 and self.backbone.channels == 3

    def _distances(self) -> Distances:
        """The distances to the real images, whose features are computed here."""
        options, found = self.options, []
        if self._repeats_gray:
            self.state.print("Gray images are repeated to RGB for the backbone.")
        for images, split in ((self.training, options.split), (self.validation, self.validation_split)):
            source = {"dataset": options.dataset, "dataset_config": options.dataset_config, "split": split}
            values = (self.backbone, images, source, options.batch_size, options.cache_dir)
            found.append(None if images is None else measures.real_features(*values))
        distances = Distances(self.backbone, *found, self.reference)
        if options.save_reference is not None:
            if distances.reference is None:
                raise ValueError(f"save_reference: the {options.split} split has too few images for moments.")
            if self.state.is_main_process:
                write_reference(options.save_reference, distances.reference)
        return distances

    def _measure(self, sampler: Sampler, distances: Distances | None, is_first: bool) -> list[dict]:
        """The figures of a sampler. Those of the first one are the model's, and how close samples are to training images."""
        options, samples, conditions = self.options, self.samples, None
        if samples is None:
            count = options.num_samples or measures.default_num_samples(self.backbone and self.backbone.dim)
            values = (count, sampler.steps, options.seed, options.batch_size)
            conditions = self.training and measures.draw_conditions(self.pipe, self.training, count, options.seed)
            samples = measures.make_samples(self.pipe, *values, conditions)
        protocol = self._protocol(sampler.steps) | {"num_samples": len(samples)}
        figures, of_samples = [], None
        if distances is not None:
            if self._repeats_gray:
                protocol["channels"] = "gray repeated to RGB"
            batch = (len(samples), options.batch_size)
            of_samples = measures.features_of(self.backbone, lambda i: samples[i], *batch)
            figures = distances.figures(of_samples, protocol) + self._recognized(samples, conditions, protocol)
        if is_first:
            for sentence in [] if distances is None else distances.left_out(len(samples)):
                self.state.print(sentence)
            self.result |= {"protocol": protocol, "figures": figures}
            if self.validation is not None:
                sets = None if distances is None else (of_samples, distances.training, distances.validation)
                near, pictures = closest_to_training(samples, self.training, self.validation, sets)
                self.result["memorization"], self.pictures = near, self.pictures | pictures
        return figures

    def _recognized(self, samples: torch.Tensor, labels: torch.Tensor | None, protocol: dict) -> list[dict]:
        """The share of samples that the backbone takes for the class asked for, if it is a classifier of the model's classes."""
        config, batch = self.pipe.unet.config, self.options.batch_size
        if labels is None or config.class_embed_type is not None or self.backbone.num_labels != count_classes(config):
            return []
        share, name = measures.recognized_share(self.backbone, lambda i: samples[i], labels, batch), self.backbone.label
        return [
            {
                "name": features.metric_name("recognized", name, len(samples)),
                "value": share,
                "validation": self._recognized_validation,
                "protocol": protocol | {"reference": "the class asked for"} | self.backbone.protocol,
            }
        ]

    @cached_property
    def _recognized_validation(self) -> float | None:
        images = self.validation
        if images is None:
            return None
        labels = images.first_labels(len(images))
        return measures.recognized_share(self.backbone, lambda i: images[i]["images"], labels, self.options.batch_size)

    def _protocol(self, steps: int) -> dict:
        """How samples are made and measured, as far as it does not depend on the backbone."""
        options, scheduler, images = self.options, self.pipe.scheduler, self.training
        config, names = scheduler.config, ("variance_type", "timestep_spacing")
        sampled = options.samples is None
        revision = options.dataset_revision or (images and features.dataset_revision(images.dataset))
        return {
            "split": images and options.split,
            "validation_split": self.validation_split,
            "reference": None if self.reference is None else Path(options.reference).name,
            "dataset_revision": revision,
            "samples": "the model's" if sampled else Path(options.samples).name,
            "sampler": ", ".join([type(scheduler).__name__, *(config[name] for name in names if config.get(name))]),
            "steps": steps,
            "seed": options.seed,
            "labels": images and images.label_column,
            "conditions": measures.describe_conditions(self.pipe, images and options.split) if sampled else None,
            "weights": self.weights and f"averaged {self.weights}",
            "backend": None if options.backend == "torch" else f"{options.backend} {options.variant or 'float32'}",
            "resolution": list(image_size(self.pipe.unet.config)),
            "dataset_resize": images and measures.resizing(images),
        }


def _public_name(dataset: str) -> str:
    """The name of a data set, or the last part of a path, which says nothing of the machine that it is on."""
    return Path(dataset).name if Path(dataset).exists() else dataset
