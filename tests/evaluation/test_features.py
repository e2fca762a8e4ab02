"""Backbones return the features they document: DINOv2 and CLIP with random weights, and the digits classifier."""

import logging
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from ddpm_hf.data.builtin import digits
from ddpm_hf.evaluation.features import (
    TransformersBackbone,
    dataset_revision,
    default_features,
    load_backbone,
    metric_name,
)

SIZE = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
SMALL = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny vision models with random weights, saved as their publishers save them."""
    torch.manual_seed(0)
    models = {
        "dinov2": Dinov2Model(Dinov2Config(**SMALL)),
        "clip": CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL, intermediate_size=16, projection_dim=10)),
        "vit": ViTModel(ViTConfig(**SMALL, intermediate_size=16), add_pooling_layer=False),
    }
    root = tmp_path_factory.mktemp("backbones")
    for name, model in models.items():
        model.eval().save_pretrained(root / name)
        CLIPImageProcessorPil(**SIZE).save_pretrained(root / name)
    return root, models


def photographs(n=3, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, channels, 16, 16), dtype=np.uint8)


@pytest.mark.parametrize(("name", "label", "dim"), [("dinov2", "DINOv2", 12), ("clip", "CLIP", 10), ("vit", "vit", 12)])
def test_features_are_the_models_output_on_normalized_pixels(folders, name, label, dim):
    root, models = folders
    backbone = TransformersBackbone(str(root / name))
    images = photographs()
    features = backbone(images)
    mean, std = (torch.tensor(getattr(backbone.processor, f"image_{what}"))[:, None, None] for what in ("mean", "std"))
    with torch.no_grad():
        output = models[name]((torch.from_numpy(images) / 255 - mean) / std)
    if name == "clip":
        expected = output.image_embeds / output.image_embeds.norm(dim=1, keepdim=True)
    else:
        expected = output.last_hidden_state[:, 0]
    assert (backbone.label, backbone.dim, features.dtype) == (label, dim, torch.float32)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert backbone.protocol["backbone"] == name and len(backbone.protocol["backbone_revision"]) == 16


def test_gray_images_are_repeated_to_rgb_and_logged(folders, caplog):
    backbone = TransformersBackbone(str(folders[0] / "dinov2"))
    gray = photographs(channels=1)
    with caplog.at_level(logging.INFO, logger="ddpm_hf"):
        features = backbone(gray)
    assert "repeated to RGB" in caplog.text
    torch.testing.assert_close(features, backbone(gray.repeat(3, axis=1)))


def test_backbone_with_missing_weights_raises(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders[0] / "dinov2", tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights, 'layernorm.weight' first: it is not trained"):
        load_backbone(str(folder))


def test_inception_without_torch_fidelity_raises():
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install torch-fidelity"):
            load_backbone("inception")
    else:
        pytest.skip("torch-fidelity is installed: its weights would have to be downloaded")


def test_digits_features_separate_the_classes():
    backbone = load_backbone("digits")
    split = digits()["test"]
    images = np.stack([np.asarray(image)[None] for image in split["image"]])
    labels = np.array(split["label"])
    features = backbone(images)
    assert features.shape == (360, 55) and features.dtype == torch.float32
    nearest = torch.cdist(features[180:], features[:180]).argmin(1).numpy()
    assert (labels[:180][nearest] == labels[180:]).mean() > 0.9
    with pytest.raises(ValueError, match=r"takes images \(N, 1, 8, 8\), got \(3, 3, 16, 16\)"):
        backbone(photographs())


def test_only_50000_samples_on_inception_are_called_fid():
    assert metric_name("FD", "Inception", 50_000) == "FID"
    assert metric_name("FD", "Inception", 49_999) == "FD-Inception, n = 49,999"
    assert metric_name("FD", "DINOv2", 50_000) == "FD-DINOv2, n = 50,000"
    assert metric_name("KD", "CLIP", 2_000) == "CMMD (unbiased), n = 2,000"
    assert metric_name("KD", "Inception", 2_000) == "KD-Inception, n = 2,000"


def test_default_features_are_the_data_sets_own_or_dinov2():
    assert default_features("digits") == "digits"
    assert default_features("photos") == default_features("./images") == "facebook/dinov2-base"


def test_revision_of_a_model_from_the_hub_is_its_commit(folders, tmp_path, monkeypatch):
    """The layout of the Hub's cache, made by hand."""
    commit, repository = "0123456789abcdef" * 2 + "01234567", tmp_path / "models--some--model"
    shutil.copytree(folders[0] / "dinov2", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for module in (huggingface_hub.constants, huggingface_hub.file_download, transformers.utils.hub.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path), raising=False)
    protocol = TransformersBackbone("some/model").protocol
    assert protocol["backbone"] == "some/model" and protocol["backbone_revision"] == commit


def test_dataset_revision_depends_on_the_content():
    splits = digits()
    assert dataset_revision(splits["train"]) == dataset_revision(digits()["train"])
    assert dataset_revision(splits["train"]) != dataset_revision(splits["test"])
