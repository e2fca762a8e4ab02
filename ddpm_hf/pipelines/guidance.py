"""Labels (classes, or conditions of `class_embed_type`), the null class, and classifier-free guidance with one call of the
network per step."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from ddpm_hf.checks import check_float, check_int, shown
from ddpm_hf.models.builders import temb_channels

Labels = float | Sequence | torch.Tensor | None


def mark_null_class(unet, null_class: int | None = None) -> None:
    """Record in the network's configuration which label means "no class": the one that label dropout puts in the
    place of labels during training. By default the last, num_class_embeds − 1.

    The entry is called `_null_class`. diffusers keeps entries that begin with an underscore through loading and
    saving, without a warning. Raises ValueError if `null_class` is not a label of the network.
    """
    last = (unet.config.num_class_embeds or 0) - 1
    unet.register_to_config(_null_class=_check_null_class(unet, last if null_class is None else null_class))


def null_class_of(unet) -> int | None:
    """The null class recorded in the network's configuration, if any."""
    return unet.config.get("_null_class")


def count_classes(unet_config: Mapping) -> int:
    """The classes of a network, without the null class; 0 of an unconditional one."""
    return (unet_config["num_class_embeds"] or 0) - (unet_config.get("_null_class") is not None)


def mark_class_names(unet, names: Sequence[str]) -> None:
    """Record the names of the labels 0, 1, ... in the network's configuration, as `_class_names`."""
    unet.register_to_config(_class_names=list(names))


def class_names_of(unet) -> list[str] | None:
    """The names of the labels 0, 1, ... (without the null class) recorded in the network's configuration, if any."""
    return unet.config.get("_class_names")


def check_marks(unet, source: str) -> None:
    """Raise ValueError if the null class or the class names in a network's configuration, read from `source`, are none."""
    names, null_class = class_names_of(unet), null_class_of(unet)
    if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"_class_names in {source} must be a list of texts, got {shown(names)}.")
    if null_class is not None:
        try:
            _check_null_class(unet, null_class)
        except ValueError as error:
            raise ValueError(f"_{error} It is read from {source}.") from error


def cycled_labels(
    unet, indices: Iterable[int], conditions: torch.Tensor | None = None
) -> list[int] | torch.Tensor | None:
    """A label for each image by its index, cycling through the rows of `conditions` (n,) or (n, D). Without them, through the
    classes other than the null class. None for an unconditional network, and for a network with `class_embed_type` without
    conditions."""
    classes, kind = unet.config.num_class_embeds, unet.config.class_embed_type
    if conditions is not None and (classes is not None or kind is not None):
        return conditions[[i % len(conditions) for i in indices]]
    if classes is None or kind is not None:
        return None
    real = [label for label in range(classes) if label != null_class_of(unet)]
    return [real[i % len(real)] for i in indices]


class Denoiser:
    """The network with class labels and classifier-free guidance: its output at (x_t, t), in float32.

    Guidance (Ho and Salimans 2022, eq. 6, with w + 1 = `guidance_scale`) is output(null) + scale·(output(label) −
    output(null)). The equation is for ε; it holds for x_0 and v as well, which are affine in ε. Both outputs come
    from one call on a batch of 2B. A learned variance is that of the label; `channels` leaves it out.

    Raises ValueError or TypeError, naming the argument, for labels and guidance that do not fit the network.
    """

    def __init__(
        self,
        unet,
        batch_size: int,
        device: torch.device | str,
        class_labels: Labels = None,
        guidance_scale: float = 1.0,
        null_class: int | None = None,
        channels: int | None = None,
    ):
        labels = _check_labels(unet, batch_size, class_labels)
        guidance_scale = check_float("guidance_scale", guidance_scale)
        self.is_guided = guidance_scale != 1
        if null_class is None and self.is_guided:
            null_class = null_class_of(unet)
            if null_class is None:
                problem = "the model is unconditional" if labels is None else "give null_class"
                raise ValueError(f"guidance_scale={guidance_scale:g} needs a null class: {problem}.")
        if null_class is not None:
            null_class = _check_null_class(unet, null_class)
        self.unet, self.guidance_scale = unet, guidance_scale
        self.channels = channels  # of the output that are returned; None: all
        self.dtype = unet.dtype  # read once: diffusers goes through all modules to find it
        if self.is_guided:
            labels = torch.cat([labels, torch.full_like(labels, null_class)])
        self.class_labels = labels if labels is None else labels.to(device)

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W), after `scheduler.scale_model_input`; t: the scheduler's timestep, a scalar tensor."""
        options = {} if self.class_labels is None else {"class_labels": self.class_labels}
        x = x.to(self.dtype)
        if not self.is_guided:
            # Samples stay float32 whatever the model's dtype: bf16 would lose the noise at small t.
            return self.unet(x, t, **options).sample[:, : self.channels].float()
        with_label, without = self.unet(torch.cat([x, x]), t, **options).sample.float().chunk(2)
        C = x.shape[1]
        guided = without[:, :C] + self.guidance_scale * (with_label[:, :C] - without[:, :C])
        return torch.cat([guided, with_label[:, C : self.channels]], 1)


def _check_labels(unet, batch_size: int, class_labels: Labels) -> torch.Tensor | None:
    kind, classes = unet.config.class_embed_type, unet.config.num_class_embeds
    if kind is None and classes is None:
        if class_labels is not None:
            raise ValueError(f"class_labels must be left out: the model is unconditional; got {class_labels!r}.")
        return None
    if class_labels is None:
        known = f"labels in 0..{classes - 1}" if kind is None else f"class_embed_type={kind!r}"
        raise ValueError(f"class_labels must be given: the model is class-conditional ({known}).")
    shape = (temb_channels(unet.config),) if kind == "identity" else ()
    each = {None: "an integer", "timestep": "a number", "identity": f"a vector of {shape} numbers"}[kind]
    try:
        labels = torch.as_tensor(class_labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"class_labels must be {each}, or {batch_size} of them, got {class_labels!r}.") from error
    labels = labels.expand(batch_size, *shape) if labels.shape == shape else labels
    if labels.shape != (batch_size, *shape):
        given = f"got shape {tuple(labels.shape)}"
        raise ValueError(f"class_labels must be {each}, or {batch_size} (one per image), {given}.")
    if labels.is_complex() or (kind is None and (labels.is_floating_point() or labels.dtype == torch.bool)):
        raise TypeError(f"class_labels must be {'integers' if kind is None else 'real numbers'}, got {labels.dtype}.")
    if kind is not None:
        if not labels.isfinite().all():
            raise ValueError("class_labels must be finite, got an infinite number or NaN.")
        return labels.float()
    if ((labels < 0) | (labels >= classes)).any():
        raise ValueError(f"class_labels must lie in 0..{classes - 1}, got {labels.tolist()}.")
    return labels.long()


def _check_null_class(unet, null_class: int) -> int:
    classes = unet.config.num_class_embeds
    if unet.config.class_embed_type is not None or classes is None:
        raise ValueError(f"null_class={null_class!r} needs a model with a table of classes (num_class_embeds).")
    return check_int("null_class", null_class, 0, classes - 1, note="the labels of the model")
