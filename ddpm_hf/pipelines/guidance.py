"""Class labels, the null class, and the network as sampling calls it: with classifier-free guidance in one batch."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch

Labels = int | Sequence[int] | torch.Tensor | None


def mark_null_class(unet, null_class: int | None = None) -> None:
    """Say in the network's configuration which label stands for "no class": the one that training put in the place
    of a label now and then. By convention the last, num_class_embeds − 1.

    The entry's name, `_null_class`, begins with an underscore, which makes diffusers carry it along from load to
    save without a warning, though no class of it knows the name. Raises ValueError for what is no label.
    """
    last = (unet.config.num_class_embeds or 0) - 1
    unet.register_to_config(_null_class=_check_null_class(unet, last if null_class is None else null_class))


def null_class_of(unet) -> int | None:
    """The label that the network's configuration names as its null class."""
    return unet.config.get("_null_class")


def mark_class_names(unet, names: Sequence[str]) -> None:
    """Say in the network's configuration what the labels 0, 1, ... are called; carried along as `_null_class` is."""
    unet.register_to_config(_class_names=list(names))


def class_names_of(unet) -> list[str] | None:
    """The names of the labels 0, 1, ..., the null class left out, where the network's configuration has them."""
    return unet.config.get("_class_names")


def cycled_classes(unet, indices: Iterable[int]) -> list[int] | None:
    """The label of each image by its index, going round through the classes, never the null class; None for an
    unconditional network."""
    classes = unet.config.num_class_embeds
    if classes is None:
        return None
    real = [label for label in range(classes) if label != null_class_of(unet)]
    return [real[i % len(real)] for i in indices]


@dataclass
class Denoiser:
    """The network's output at (x_t, t), float32, with labels and guidance put in.

    Guidance (Ho and Salimans 2022, eq. 6, with w + 1 = `guidance_scale`) is output(null) + scale·(output(label) −
    output(null)): of ε there, and the same of x_0 or v, which are affine in ε. Both come from one call on a batch of
    2B. A learned variance is that of the label.
    """

    unet: torch.nn.Module
    class_labels: torch.Tensor | None = None
    guidance_scale: float = 1.0
    null_class: int | None = None

    def __post_init__(self):
        self.dtype = self.unet.dtype  # asked once: diffusers walks all of the modules for it
        self.is_guided = self.class_labels is not None and self.guidance_scale != 1
        if self.is_guided:
            null = torch.full_like(self.class_labels, self.null_class)
            self.class_labels = torch.cat([self.class_labels, null])

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W), as the scheduler scaled it; t: what the scheduler calls its timestep."""
        options = {} if self.class_labels is None else {"class_labels": self.class_labels}
        x = x.to(self.dtype)
        if not self.is_guided:
            # Samples stay float32 whatever the model computes in: bf16 would lose the noise at small t.
            return self.unet(x, t, **options).sample.float()
        with_label, without = self.unet(torch.cat([x, x]), t, **options).sample.float().chunk(2)
        C = x.shape[1]
        guided = without[:, :C] + self.guidance_scale * (with_label[:, :C] - without[:, :C])
        return torch.cat([guided, with_label[:, C:]], 1)


def make_denoiser(
    unet,
    batch_size: int,
    device: torch.device | str,
    class_labels: Labels = None,
    guidance_scale: float = 1.0,
    null_class: int | None = None,
) -> Denoiser:
    """The denoiser of a call. Raises ValueError or TypeError, naming the argument, for labels and guidance that do
    not fit the network."""
    labels = _check_labels(unet, batch_size, class_labels)
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale!r}.")
    if null_class is not None:
        null_class = _check_null_class(unet, null_class)
    elif guidance_scale != 1:
        null_class = null_class_of(unet)
        if labels is None or null_class is None:
            why = "it is unconditional" if labels is None else "its configuration names none; give null_class if it has"
            raise ValueError(
                f"guidance_scale={guidance_scale:g} needs a model with a null class (trained by leaving out labels): "
                f"{why}. 1 is sampling without guidance."
            )
        null_class = _check_null_class(unet, null_class)
    return Denoiser(unet, labels if labels is None else labels.to(device), float(guidance_scale), null_class)


def _check_labels(unet, batch_size: int, class_labels: Labels) -> torch.Tensor | None:
    kind, classes = unet.config.class_embed_type, unet.config.num_class_embeds
    if kind is None and classes is None:
        if class_labels is not None:
            raise ValueError(f"class_labels must be left out: the model is unconditional; got {class_labels!r}.")
        return None
    if class_labels is None:
        known = f"labels in 0..{classes - 1}" if kind is None else f"class_embed_type={kind!r}"
        raise ValueError(f"class_labels must be given: the model is class-conditional ({known}).")
    try:
        labels = torch.as_tensor(class_labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"class_labels must be an integer or {batch_size} of them, got {class_labels!r}.") from error
    labels = labels.expand(batch_size) if labels.ndim == 0 else labels
    if labels.shape[0] != batch_size or (kind != "identity" and labels.ndim != 1):
        raise ValueError(
            f"class_labels must be one label, or {batch_size} (one per image), got shape {tuple(labels.shape)}."
        )
    if kind is None:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"class_labels must be integers, got {labels.dtype}.")
        if ((labels < 0) | (labels >= classes)).any():
            raise ValueError(f"class_labels must lie in 0..{classes - 1}, got {labels.tolist()}.")
        labels = labels.long()
    return labels


def _check_null_class(unet, null_class: int) -> int:
    classes = unet.config.num_class_embeds
    if unet.config.class_embed_type is not None or classes is None:
        raise ValueError(f"null_class={null_class!r} needs a model with a table of classes (num_class_embeds).")
    if isinstance(null_class, bool) or not isinstance(null_class, int) or not 0 <= null_class < classes:
        raise ValueError(f"null_class must be one of the model's labels, 0..{classes - 1}, got {null_class!r}.")
    return null_class
