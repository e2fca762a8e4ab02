"""Each layer against its formula."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from ddpm_hf.models.layers import (
    AttentionBlock,
    Downsample,
    DownStage,
    ResnetBlock,
    SiLU,
    UpsampleConv2d,
    make_activation,
)

BLOCK = {"groups": 2, "eps": 1e-5, "act_fn": "silu", "dropout": 0.0}


@pytest.mark.parametrize("batch", [1, 16], ids=["few pixels", "many pixels"])
def test_upsampling_repeats_pixels_and_convolves(batch):
    """Both implementations, with all gradients."""
    conv = UpsampleConv2d(3).double()
    x = torch.randn(batch, 3, 5, 9, dtype=torch.float64, requires_grad=True)
    given = (x, conv.weight, conv.bias)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), conv.weight, conv.bias, padding=1)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(*(torch.autograd.grad((y * weights).sum(), given) for y in (conv(x), expected))):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("padding", [0, 1])
def test_downsampling_halves_the_size(padding):
    layer, x = Downsample(3, padding), torch.randn(2, 3, 8, 6)
    conv = layer.conv
    padded = F.pad(x, (1, 1, 1, 1) if padding else (0, 1, 0, 1))
    torch.testing.assert_close(layer(x), F.conv2d(padded, conv.weight, conv.bias, stride=2))
    assert layer(x).shape == (2, 3, 4, 3)


def test_silu_is_in_place_only_without_gradients():
    x = torch.randn(5)
    expected = x * torch.sigmoid(x)
    assert torch.allclose(SiLU()(x), expected) and not torch.equal(x, expected)
    with torch.no_grad():
        result = SiLU()(x)
    torch.testing.assert_close(result, expected)
    assert result.data_ptr() == x.data_ptr()


def test_activation_is_the_one_of_its_name():
    assert isinstance(make_activation("silu"), SiLU) and isinstance(make_activation("swish"), SiLU)
    assert isinstance(make_activation("gelu"), torch.nn.GELU)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize(("c_in", "c_out"), [(4, 4), (4, 6)])
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_resnet_block_equals_its_formula(resample, c_in, c_out, scale_shift):
    block = ResnetBlock(
        c_in, c_out, 8, **BLOCK, scale_shift=scale_shift, resample=resample, output_scale_factor=2.0
    ).double()
    x, temb = torch.randn(3, c_in, 4, 4).double(), torch.randn(3, 8).double()
    resized = {
        None: lambda y: y,
        "up": lambda y: y.repeat_interleave(2, 2).repeat_interleave(2, 3),
        "down": lambda y: y.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5)),
    }[resample]
    h = block.conv1(resized(F.silu(block.norm1(x))))
    embedding = block.time_emb_proj(temb)[:, :, None, None]
    if scale_shift:
        h = block.norm2(h) * (1 + embedding[:, :c_out]) + embedding[:, c_out:]
    else:
        h = block.norm2(h + embedding)
    shortcut = resized(x) if c_in == c_out else block.conv_shortcut(resized(x))
    expected = (shortcut + block.conv2(F.silu(h))) / 2
    torch.testing.assert_close(block(x, temb), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head_dim", [8, 4, 3])
@pytest.mark.parametrize("groups", [2, None])
def test_attention_equals_its_formula(groups, head_dim):
    block = AttentionBlock(8, head_dim, groups=groups, eps=1e-5, output_scale_factor=2.0).double()
    x = torch.randn(2, 8, 3, 5).double()
    h = (x if groups is None else block.group_norm(x)).flatten(2).transpose(1, 2)
    heads = [p(h).unflatten(2, (8 // head_dim, head_dim)).transpose(1, 2) for p in (block.to_q, block.to_k, block.to_v)]
    weights = (heads[0] @ heads[1].transpose(2, 3) / head_dim**0.5).softmax(-1)
    out = block.to_out[0]((weights @ heads[2]).transpose(1, 2).flatten(2)).transpose(1, 2).view_as(x)
    torch.testing.assert_close(block(x), (x + out) / 2, rtol=1e-10, atol=1e-12)


def test_attention_has_the_weights_of_diffusers_attention():
    block = AttentionBlock(8, 4, groups=2, eps=1e-5)
    stock = Attention(8, heads=2, dim_head=4, bias=True, norm_num_groups=2)
    shapes = [{name: tuple(p.shape) for name, p in module.state_dict().items()} for module in (block, stock)]
    assert shapes[0] == shapes[1]


def test_attention_with_more_channels_a_head_than_there_are_is_refused():
    with pytest.raises(ValueError, match="attention_head_dim must be at most the number of channels, 8, got 16"):
        AttentionBlock(8, 16, groups=2, eps=1e-5)


def test_down_stage_returns_every_image_for_the_skips():
    resnets = [ResnetBlock(4, 4, 8, **BLOCK, scale_shift=False) for _ in range(2)]
    x, skips = DownStage(resnets, [], [Downsample(4, 1)])(torch.randn(1, 4, 8, 8), torch.randn(1, 8))
    assert [tuple(s.shape[2:]) for s in skips] == [(8, 8), (8, 8), (4, 4)] and skips[-1] is x
