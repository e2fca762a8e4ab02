"""Backbones: 8-bit images to the features that metrics.py compares, and a cache of those of real images.

A backbone is called with uint8 images (N, C, H, W) and returns float32 (N, `dim`) on the CPU. What it is and how it
resizes is in `protocol`, which belongs beside every figure made with it.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

from ddpm_hf.data.finding import fingerprint
from ddpm_hf.evaluation.judges import judge_of
from ddpm_hf.files import atomic_file

logger = logging.getLogger(__name__)
FID_SAMPLES = 50_000
SHORT_NAMES = {"dinov2": "DINOv2", "dinov2_with_registers": "DINOv2", "clip": "CLIP", "clip_vision_model": "CLIP"}


class TransformersBackbone:
    """A vision model of transformers, from a folder or the Hub: safetensors weights, with the images prepared as its own
    `preprocessor_config.json` says. CLIP gives its normalized projected embedding; others their pooled output, or
    their first token where the pooler's weights are not among the saved ones.

    Raises ValueError for weights that are not all there: random features give plausible figures.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", revision: str | None = None):
        self.device = torch.device(device)
        config = AutoConfig.from_pretrained(name, revision=revision)
        self.is_clip = config.model_type in ("clip", "clip_vision_model")
        loader = CLIPVisionModelWithProjection if self.is_clip else AutoModel
        model, info = loader.from_pretrained(
            name, revision=revision, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
        missing = sorted(info["missing_keys"])
        self.use_pooler = not missing
        if absent := [key for key in missing if self.is_clip or not key.startswith("pooler.")]:
            raise ValueError(
                f"the backbone {name!r} lacks {len(absent)} weights, {absent[0]!r} first: it is not trained."
            )
        self.model = model.eval().to(self.device)
        # Without torchvision this is the only backend; asked for by name, it is the same everywhere.
        self.processor = AutoImageProcessor.from_pretrained(name, revision=revision, backend="pil")
        self.label = SHORT_NAMES.get(config.model_type, config.model_type)
        self.channels = 3
        self.dim = self(np.zeros((1, 3, 32, 32), np.uint8)).shape[1]
        settings = self.processor.to_dict()
        kept = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "image_mean", "image_std")
        self.protocol = {
            "backbone": name if not Path(name).is_dir() else Path(name).name,
            "backbone_revision": getattr(config, "_commit_hash", None) or _folder_digest(Path(name)),
            "features": "normalized image_embeds" if self.is_clip else "pooler" if self.use_pooler else "first token",
            "resize": json.loads(json.dumps({key: settings.get(key) for key in kept}, default=dict)),
        }

    @torch.no_grad()
    def __call__(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        images = as_rgb(np.asarray(images))
        pixels = self.processor(list(images), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
        output = self.model(pixels.to(self.device, torch.float32))
        if self.is_clip:
            features = torch.nn.functional.normalize(output.image_embeds, dim=-1)
        elif self.use_pooler and getattr(output, "pooler_output", None) is not None:
            features = output.pooler_output.flatten(1)
        else:
            features = output.last_hidden_state[:, 0]
        return features.float().cpu()


class InceptionBackbone:
    """The InceptionV3 of the original FID by torch-fidelity's port (2,048 features, TensorFlow 1's bilinear resizing without
    antialiasing), for which torch-fidelity has to be installed. Its published weights are a pickle, and are read as
    tensors only."""

    def __init__(self, device: torch.device | str = "cpu"):
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
            self.model = NoTrainInceptionV3("inception-v3-compat", ["2048"], antialias=False).to(device)
        except ModuleNotFoundError as error:
            raise ValueError("features 'inception' need torch-fidelity: pip install torch-fidelity.") from error
        finally:
            os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
        self.device, self.label, self.channels, self.dim = torch.device(device), "Inception", 3, 2048
        self.protocol = {
            "backbone": "torch-fidelity inception-v3-compat",
            "backbone_revision": "pt_inception-2015-12-05-6726825d",
            "features": "2048",
            "resize": "bilinear to 299 as TensorFlow 1",
        }

    @torch.no_grad()
    def __call__(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        return self.model(torch.from_numpy(as_rgb(np.asarray(images))).to(self.device)).float().cpu()


Backbone = TransformersBackbone | InceptionBackbone


def load_backbone(name: str, device: torch.device | str = "cpu") -> Backbone:
    """The backbone of a built-in data set that has one ("digits"), "inception", or a vision model of transformers by
    folder or name."""
    if (judge := judge_of(name)) is not None:
        return judge.backbone()
    return InceptionBackbone(device) if name == "inception" else TransformersBackbone(name, device)


def as_rgb(images: np.ndarray) -> np.ndarray:
    """uint8 (N, 1 or 3, H, W) to (N, 3, H, W). Gray is repeated, which is logged. Raises ValueError for other images."""
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (N, 1 or 3, H, W), got {images.dtype} {images.shape}.")
    if images.shape[1] == 3:
        return images
    logger.info("Gray images are repeated to RGB for the backbone.")
    return images.repeat(3, axis=1)


def compute_features(backbone: Callable, batches: Iterable[np.ndarray | torch.Tensor]) -> torch.Tensor:
    """Features (N, d) of batches of uint8 images. Raises ValueError for batches of different sizes."""
    parts, shape = [], None
    for images in batches:
        if shape is not None and images.shape[1:] != shape:
            raise ValueError(f"images must have one resolution, got {tuple(shape)} and {tuple(images.shape[1:])}.")
        shape = images.shape[1:]
        parts.append(backbone(images))
    return torch.cat(parts)


def figure_name(kind: str, backbone: Backbone, num_samples: int) -> str:
    """What a figure may be called: FID only for 50,000 samples on Inception."""
    if kind == "FD" and backbone.label == "Inception" and num_samples == FID_SAMPLES:
        return "FID"
    if kind == "MMD":
        special = {"CLIP": "CMMD (unbiased)", "Inception": "KD-Inception"}
        return f"{special.get(backbone.label, f'KD-{backbone.label}')}, n = {num_samples:,}"
    return f"{kind}-{backbone.label}, n = {num_samples:,}"


def dataset_revision(dataset: datasets.Dataset) -> str:
    """What tells one content of a data set from another: the Hub's commit by the addresses it was downloaded from, or the
    fingerprint that `datasets` keeps of local data."""
    sources = sorted(dataset.info.download_checksums or {})
    return hashlib.sha256(json.dumps([sources, fingerprint(dataset)]).encode()).hexdigest()[:16]


def read_cached(folder: Path, key: dict) -> torch.Tensor | None:
    """The features of real images that the safetensors file of this key in `folder` holds, if there is one.

    `key` (JSON-able: data set, revision, split, resolution, resize filter, backbone and its revision) is hashed for the
    file's name and kept in it, so that a file tells what it is of.
    """
    file, text = _cache_file(folder, key)
    if file.is_file():
        with safe_open(file, "pt") as saved:
            if saved.metadata().get("key") == text:
                return saved.get_tensor("features")
    return None


def write_cached(folder: Path, key: dict, features: torch.Tensor) -> None:
    """Keep features (N, d) for `read_cached`."""
    file, text = _cache_file(folder, key)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_file(file, save({"features": features.contiguous()}, metadata={"key": text}))


def _cache_file(folder: Path, key: dict) -> tuple[Path, str]:
    text = json.dumps(key, sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors", text


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
