"""Backbones, which turn 8-bit images into the features that metrics.py compares.

A backbone takes uint8 images (N, C, H, W) and returns float32 features (N, `dim`) on the CPU. Its `protocol` says which
model it is and how it resizes images, and belongs with every metric that is computed on its features.
"""

import hashlib
import json
import logging
import os
from pathlib import Path

import datasets
import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    CLIPVisionModelWithProjection,
)

from ddpm_hf.data.columns import fingerprint
from ddpm_hf.evaluation.judges import judge_of

logger = logging.getLogger(__name__)
FID_SAMPLES = 50_000
SHORT_NAMES = {"dinov2": "DINOv2", "dinov2_with_registers": "DINOv2", "clip": "CLIP", "clip_vision_model": "CLIP"}


class TransformersBackbone:
    """A vision model of transformers, from a folder or the Hub.

    Weights are safetensors, and images are prepared as the model's `preprocessor_config.json` says. The features are
    CLIP's normalized projected embedding, or another model's pooled output, or its first token if the saved weights
    have no pooler. A classifier also tells the class of an image (`classify`), one of `num_labels`; None for no classifier.

    Raises ValueError if weights are missing: random features would give plausible metrics.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", revision: str | None = None):
        self.device = torch.device(device)
        config = AutoConfig.from_pretrained(name, revision=revision)
        self.is_clip = config.model_type in ("clip", "clip_vision_model")
        is_classifier = any(kind.endswith("ForImageClassification") for kind in config.architectures or ())
        loader = CLIPVisionModelWithProjection if self.is_clip else AutoModel
        loader = AutoModelForImageClassification if is_classifier else loader
        model, info = loader.from_pretrained(
            name, revision=revision, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
        missing = sorted(info["missing_keys"])
        self.use_pooler = not missing
        if absent := [key for key in missing if self.is_clip or not key.startswith("pooler.")]:
            raise ValueError(f"backbone {name!r} lacks {len(absent)} weights, {absent[0]!r} first: it is not trained.")
        model = model.eval().to(self.device)
        self.classifier, self.num_labels = (model, config.num_labels) if is_classifier else (None, None)
        self.model = model.base_model if is_classifier else model
        # The backend is named because the default depends on whether torchvision is installed.
        self.processor = AutoImageProcessor.from_pretrained(name, revision=revision, backend="pil")
        self.label = SHORT_NAMES.get(config.model_type, config.model_type)
        self.channels = 3
        self.dim = self(np.zeros((1, 3, 32, 32), np.uint8)).shape[1]
        settings = self.processor.to_dict()
        kept = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "image_mean", "image_std")
        self.protocol = {
            "backbone": Path(name).name if Path(name).is_dir() else name,
            "backbone_revision": _model_revision(name, revision),
            "features": "normalized image_embeds" if self.is_clip else "pooler" if self.use_pooler else "first token",
            "resize": json.loads(json.dumps({key: settings.get(key) for key in kept}, default=dict)),
        }

    def _pixels(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        images = as_rgb(np.asarray(images))
        pixels = self.processor(list(images), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
        return pixels.to(self.device, torch.float32)

    @torch.no_grad()
    def classify(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """The class (N,) of each image, of a classifier."""
        return self.classifier(self._pixels(images)).logits.argmax(1).cpu()

    @torch.no_grad()
    def __call__(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        output = self.model(self._pixels(images))
        if self.is_clip:
            features = torch.nn.functional.normalize(output.image_embeds, dim=-1)
        elif self.use_pooler and getattr(output, "pooler_output", None) is not None:
            features = output.pooler_output.flatten(1)
        else:
            features = output.last_hidden_state[:, 0]
        return features.float().cpu()


def _model_revision(name: str, revision: str | None) -> str:
    """The commit of a model from the Hub, or a digest of the weights in a folder."""
    if not Path(name).is_dir():
        # A file in the cache of the Hub lies in the folder snapshots/<commit>/.
        return Path(try_to_load_from_cache(name, "config.json", revision=revision)).parent.name
    digest = hashlib.sha256()
    for file in sorted(Path(name).glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


class InceptionBackbone:
    """The InceptionV3 of the original FID in torch-fidelity's port: 2,048 features, and TensorFlow 1's bilinear resizing
    without antialiasing. Raises ValueError if torch-fidelity is not installed."""

    label, channels, dim, num_labels = "Inception", 3, 2048, None
    protocol = {
        "backbone": "torch-fidelity inception-v3-compat",
        "backbone_revision": "pt_inception-2015-12-05-6726825d",
        "features": "2048",
        "resize": "bilinear to 299 as TensorFlow 1",
    }

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            # The published weights are a pickle. PyTorch's documented switch makes torch-fidelity read tensors only.
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
            self.model = NoTrainInceptionV3("inception-v3-compat", ["2048"], antialias=False).to(device)
        except ModuleNotFoundError as error:
            raise ValueError("features 'inception' need torch-fidelity: pip install torch-fidelity.") from error
        finally:
            os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)

    @torch.no_grad()
    def __call__(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        return self.model(torch.from_numpy(as_rgb(np.asarray(images))).to(self.device)).float().cpu()


Backbone = TransformersBackbone | InceptionBackbone


def default_features(dataset: str) -> str:
    """The features for a data set: its own judge's backbone if it has one, else DINOv2."""
    return "facebook/dinov2-base" if judge_of(dataset) is None else dataset


def load_backbone(name: str, device: torch.device | str = "cpu") -> Backbone:
    """The backbone of a built-in data set by its name, "inception", or a vision model of transformers by its folder or
    its name on the Hub."""
    if (judge := judge_of(name)) is not None:
        return judge.backbone()
    return InceptionBackbone(device) if name == "inception" else TransformersBackbone(name, device)


def as_rgb(images: np.ndarray) -> np.ndarray:
    """uint8 (N, 1 or 3, H, W) to (N, 3, H, W); gray is repeated, which is logged. Raises ValueError for other images."""
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (N, 1 or 3, H, W), got {images.dtype} {images.shape}.")
    if images.shape[1] == 3:
        return images
    logger.info("Gray images are repeated to RGB for the backbone.")
    return images.repeat(3, axis=1)


def metric_name(kind: str, label: str, num_samples: int) -> str:
    """The name of a metric ("FD", "KD", "precision", ...) on the backbone with this label. Only the Fréchet distance of
    50,000 samples on Inception is called FID."""
    if (kind, label, num_samples) == ("FD", "Inception", FID_SAMPLES):
        return "FID"
    name = "CMMD (unbiased)" if (kind, label) == ("KD", "CLIP") else f"{kind}-{label}"
    return f"{name}, n = {num_samples:,}"


def dataset_revision(dataset: datasets.Dataset) -> str:
    """A digest that changes with the content of a data set."""
    # Addresses of downloads include the Hub's commit.
    sources = sorted(dataset.info.download_checksums or {})
    return hashlib.sha256(json.dumps([sources, fingerprint(dataset)]).encode()).hexdigest()[:16]
