"""The parts of the U-Net for a configuration."""

import pytest
from diffusers.configuration_utils import FrozenDict
from torch import nn

from ddpm_hf import UNet2DModelCustom
from ddpm_hf.models.builders import build_embeddings, build_stages, check_arguments


@pytest.fixture
def config(unet_config):
    def make(**changes) -> FrozenDict:
        return FrozenDict({**dict(UNet2DModelCustom(**unet_config).config), **changes})

    return make


def test_up_path_takes_one_skip_per_layer_of_the_down_path(config):
    down, middle, up = build_stages(config(layers_per_block=2))
    skips = 1 + sum(len(stage.resnets) + len(stage.downsamplers) for stage in down)
    assert sum(len(stage.resnets) for stage in up) == skips
    assert [len(stage.downsamplers) for stage in down] == [1, 0]
    assert [len(stage.upsamplers) for stage in up] == [1, 0]
    assert len(middle.resnets) == 2


def test_middle_is_optional(config):
    assert build_stages(config(mid_block_type=None))[1] is None
    assert not build_stages(config(add_attention=False))[1].attentions


@pytest.mark.parametrize(
    ("changes", "features", "labels"),
    [
        ({}, 8, type(None)),
        ({"time_embedding_type": "fourier", "num_class_embeds": 5}, 16, nn.Embedding),
        ({"time_embedding_type": "learned", "num_train_timesteps": 10, "class_embed_type": "identity"}, 8, nn.Identity),
    ],
)
def test_embeddings_have_the_width_of_the_configuration(config, changes, features, labels):
    _, time_embedding, class_embedding = build_embeddings(config(**changes))
    assert time_embedding.linear_1.in_features == features and time_embedding.linear_2.out_features == 32
    assert isinstance(class_embedding, labels)


def test_configuration_of_the_tiny_network_passes_the_checks(config):
    check_arguments(config())
    check_arguments(config(down_block_types=("UNetResDownBlock2D", "UNetResAttnDownBlock2D")))
