"""The parts of the U-Net for a configuration."""

import inspect
import json
import math
import re
from collections import namedtuple
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_hf import UNet2DModelCustom
from ddpm_hf.models.builders import ARGUMENTS, build_embeddings, build_stages, check_arguments
from tests.conftest import TINY_UNET


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


# ------------------------------------------------------------------ checks of the arguments

# Values of any kind, that some argument does not take.
ODD_VALUES = [
    None, True, False, -1, 0, 1, 2, 3, 7, 10**7, 2**31, 2**63, -(10**400), 10**400, 0.5, -0.5, 1.0, math.nan, math.inf,
    -math.inf, 1j, Fraction(1, 3), "", "8", "silu", "conv", "DownBlock2D", b"8", [], (), [8], (8, 16), (8, 16, 24), [8, 0],
    [16, True], [8.0, 16.0], ["8", "16"], [None, None], [[8], [16]], {}, {"a": 1}, {8, 16}, range(8, 24, 8), object(), int,
    np.int64(4), np.uint8(0), np.float32(0.5), np.float64("nan"), np.bool_(True), np.array([8, 16]), np.array(4),
    torch.tensor(4), torch.tensor([8, 16]), torch.float32, iter([8, 16]), ("DownBlock2D", "AttnDownBlock2D"),
    ("DownBlock2D", None), ("UpBlock2D",) * 2, ("SkipDownBlock2D", "DownBlock2D"),
]  # fmt: skip
# Values that the tiny network takes, alone or together with others.
FITTING_VALUES = {
    "sample_size": [None, 16, (8, 16), [16, 8], np.int32(8), (np.int64(8), 8)],
    "in_channels": [1, 4, np.int64(3)],
    "out_channels": [1, 6, np.uint8(3)],
    "center_input_sample": [True, np.bool_(False)],
    "time_embedding_type": ["positional", "fourier", "learned"],
    "time_embedding_dim": [None, 20, np.int64(8)],
    "freq_shift": [0, 1, np.int64(3)],
    "flip_sin_to_cos": [True, False],
    "down_block_types": [("AttnDownBlock2D",) * 2, ["ResnetDownsampleBlock2D", "UNetResAttnDownBlock2D"]],
    "mid_block_type": [None, "UNetMidBlock2D"],
    "up_block_types": [("AttnUpBlock2D",) * 2, ["UNetResUpBlock2D", "ResnetUpsampleBlock2D"]],
    "block_out_channels": [(8, 8), [16, 8], (np.int64(8), 24), (8, 12)],
    "layers_per_block": [1, 2, 3, np.int64(2)],
    "mid_block_scale_factor": [1, 2**0.5, np.float32(2)],
    "downsample_padding": [0, 1, np.int64(1)],
    "downsample_type": ["conv", "resnet", None],
    "upsample_type": ["conv", "resnet", None],
    "dropout": [0, 0.3, np.float64(0.1)],
    "act_fn": ["silu", "SiLU", "swish", "mish", "gelu", "relu"],
    "attention_head_dim": [None, 1, 4, 8, np.int64(2)],
    "norm_num_groups": [1, 2, 4, np.int64(8)],
    "attn_norm_num_groups": [None, 1, 8],
    "norm_eps": [1e-6, 1, np.float32(1e-3)],
    "resnet_time_scale_shift": ["default", "scale_shift"],
    "add_attention": [True, False],
    "class_embed_type": [None, "timestep", "identity"],
    "num_class_embeds": [None, 1, 5, np.int64(3)],
    "num_train_timesteps": [None, 10, np.int64(20)],
    "zero_init_output": [False],
}
arguments = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from(values) for name, values in FITTING_VALUES.items()}
)
odd_arguments = st.dictionaries(st.sampled_from(sorted(ARGUMENTS)), st.sampled_from(ODD_VALUES), max_size=2)


def test_every_constructor_argument_has_a_check_and_a_value_that_passes():
    names = list(inspect.signature(UNet2DModelCustom.__init__).parameters)[1:]
    assert list(ARGUMENTS) == names == list(FITTING_VALUES)


@settings(derandomize=True, max_examples=150, deadline=20_000, database=None)
@given(arguments, odd_arguments)
def test_any_arguments_give_stocks_network_or_an_error_that_names_one(fitting, odd):
    config = {**TINY_UNET, **fitting, **odd}
    try:
        torch.manual_seed(0)
        unet = UNet2DModelCustom(**config)
    except (ValueError, TypeError) as error:
        assert set(re.findall(r"\w+", str(error))) & ARGUMENTS.keys() and " must " in str(error), error
        return
    if config.pop("zero_init_output", False):
        return
    torch.manual_seed(0)
    stock = UNet2DModel(**config).state_dict()
    assert all(torch.equal(stock[key], value) for key, value in unet.state_dict().items())
    assert UNet2DModelCustom.from_config(unet.config).to_json_string() == unet.to_json_string()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_values_of_a_wrong_kind_are_refused_by_name(name):
    taken = []
    for value in ODD_VALUES:
        try:
            ARGUMENTS[name](name, value)
            taken.append(value)
        except ValueError as error:
            assert re.match(rf"(each of )?{name} must be ", str(error)), error
    assert len(taken) < 15, taken
    assert not any(
        isinstance(value, (set, dict, complex, torch.Tensor, np.ndarray, object.__class__)) for value in taken
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers_per_block": -1}, "layers_per_block must be an integer in 1..100, got -1."),
        ({"layers_per_block": 10**9}, "layers_per_block must be an integer in 1..100, got 1000000000."),
        ({"norm_eps": math.nan}, "norm_eps must be a finite number in (0, 1], got nan."),
        ({"in_channels": 0}, "in_channels must be an integer in 1..16384, got 0."),
        ({"out_channels": "3"}, "out_channels must be an integer in 1..16384, got '3'."),
        ({"block_out_channels": (8,)}, "down_block_types must be as long as block_out_channels (8,), got"),
        ({"block_out_channels": {8, 16}}, "block_out_channels must be a list or a tuple, got {8, 16}."),
        ({"block_out_channels": (8, 16.0)}, "each of block_out_channels must be an integer in 1..16384, got 16.0."),
        ({"down_block_types": "DownBlock2D"}, "down_block_types must be a list or a tuple, got 'DownBlock2D'."),
        (
            {"sample_size": (8, 8, 8)},
            "sample_size must be a number of pixels or a pair (height, width), got (8, 8, 8).",
        ),
        ({"sample_size": (8, 0)}, "sample_size must be an integer in 1..65536, got 0."),
        ({"add_attention": "no"}, "add_attention must be True or False, got 'no'."),
        ({"freq_shift": 4}, "freq_shift must be less than half of block_out_channels[0], 4, got 4."),
        ({"attention_head_dim": 0}, "attention_head_dim must be an integer in 1..16384, got 0."),
        (
            {"attention_head_dim": 17},
            "attention_head_dim must be at most 16, the fewest channels of a level with attention, got 17.",
        ),
    ],
)
def test_errors_say_what_is_accepted(unet_config, changes, named):
    with pytest.raises(ValueError, match="^" + re.escape(named)):
        UNet2DModelCustom(**{**unet_config, **changes})


def test_heads_must_fit_into_the_levels_with_attention_alone(unet_config):
    UNet2DModelCustom(**{**unet_config, "block_out_channels": (12, 16), "attention_head_dim": 16})
    unattended = {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "add_attention": False,
    }
    UNet2DModelCustom(**{**unet_config, **unattended, "attention_head_dim": 17})


def test_numbers_and_tuples_of_other_libraries_are_saved_as_plain_ones(unet_config):
    size = namedtuple("Size", "height width")(8, np.int64(16))
    unet = UNet2DModelCustom(
        **{**unet_config, "sample_size": size, "norm_eps": Fraction(1, 4), "dropout": np.float32(0)}
    )
    saved = json.loads(unet.to_json_string())
    assert (saved["sample_size"], saved["norm_eps"], saved["dropout"]) == ([8, 16], 0.25, 0.0)
