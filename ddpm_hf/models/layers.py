"""The layers of the U-Net. Module names are those of diffusers, because they are the keys of its checkpoints.

Images are (B, C, H, W), in channels-last memory. `temb` is the time embedding after the activation: (B, D), or (1, D) if
the batch shares one timestep.
"""

import torch
import torch.nn.functional as F
from diffusers.models.activations import get_activation
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import nn


class SiLU(nn.SiLU):
    """x·σ(x), in place if no gradient is recorded: allocating memory takes longer than the function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())


def make_activation(act_fn: str) -> nn.Module:
    """The activation that diffusers calls `act_fn`. It may work in place."""
    activation = get_activation(act_fn)
    return SiLU() if isinstance(activation, nn.SiLU) else activation


class Downsample(nn.Module):
    """Halve the size by a 3×3 convolution of stride 2. With padding 0, one pixel is padded at the right and bottom."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


# Row a of the 4×4 kernel below is the sum of the rows of the 3×3 one that fall on the same source pixel.
_ROW_SUMS = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], device="cpu")
_KERNEL_SUMS = torch.kron(_ROW_SUMS, _ROW_SUMS)
# With fewer source pixels than this, summing the weights costs more than it saves (measured on a CPU).
_MIN_PIXELS_FOR_SUMMING = 256


class UpsampleConv2d(nn.Conv2d):
    """Double the size by repeating pixels, followed by a 3×3 convolution.

    Repeated pixels share products. A transposed convolution of stride 2 with a 4×4 kernel of summed weights computes the
    same function with 16 products per source pixel instead of 36.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting() or not self._summing_pays(x):  # the number of pixels of an export is not known
            return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        C = self.out_channels
        weight = _KERNEL_SUMS.to(self.weight.dtype) @ self.weight.permute(2, 3, 1, 0).reshape(9, C * C)
        # The convolution would convert the memory format itself, but several times more slowly.
        weight = weight.view(4, 4, C, C).permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(x, weight, self.bias, stride=2, padding=1)

    def _summing_pays(self, x: torch.Tensor) -> bool:
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        return x.device.type == "cpu" and self.weight.dtype.itemsize >= 4 and pixels >= _MIN_PIXELS_FOR_SUMMING


class Upsample(nn.Module):
    """`UpsampleConv2d` under the state-dict key of diffusers."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = UpsampleConv2d(channels)

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        return self.conv(x)


class ResnetBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))) + temb))), with a 1×1 convolution on the shortcut if the channels change.

    With `scale_shift` the embedding scales and shifts the output of the second norm instead of being added before it.
    `resample` ("up" or "down") doubles or halves the size of both branches after the first activation. Sums are computed
    in place of the convolutions' outputs, which no gradient needs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        *,
        groups: int,
        eps: float,
        output_scale_factor: float = 1.0,
        act_fn: str,
        dropout: float,
        scale_shift: bool,
        resample: str | None = None,
    ):
        super().__init__()
        self.scale_shift, self.resample, self.output_scale_factor = scale_shift, resample, output_scale_factor
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = make_activation(act_fn)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        h = self.nonlinearity(self.norm1(x))
        if self.resample == "up":
            x, h = (F.interpolate(y, scale_factor=2.0, mode="nearest") for y in (x, h))
        elif self.resample == "down":
            x, h = (F.avg_pool2d(y, 2) for y in (x, h))
        h = self.conv1(h)
        temb = self.time_emb_proj(temb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = temb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h.add_(temb))
        h = self.conv2(self.dropout(self.nonlinearity(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        h = h.add_(x)
        return h if self.output_scale_factor == 1.0 else h / self.output_scale_factor


class SelfAttentionProcessor:
    """Self-attention over pixels with the backend of `set_attention_backend` (by default PyTorch's).

    Queries, keys and values keep the layout of their projections, (B, H·W, heads, d), so that channels-last images need
    no copy.
    """

    # Set by diffusers' set_attention_backend() and enable_parallelism() (seen in diffusers 0.42).
    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "AttentionBlock", x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        h = x if attn.group_norm is None else attn.group_norm(x)
        h = h.permute(0, 2, 3, 1).reshape(B, H * W, C)
        qkv = attn.to_qkv(h).chunk(3, dim=-1) if attn.fused_projections else (attn.to_q(h), attn.to_k(h), attn.to_v(h))
        q, k, v = (part.unflatten(-1, (attn.heads, -1)) for part in qkv)
        h = dispatch_attention_fn(q, k, v, backend=self._attention_backend).flatten(2)
        h = x + attn.to_out[0](h).reshape(B, H, W, C).permute(0, 3, 1, 2)
        return h if attn.rescale_output_factor == 1.0 else h / attn.rescale_output_factor


class AttentionBlock(AttentionModuleMixin, Attention):
    """x + out(attention(norm(x))) over the H·W pixels, with `channels // head_dim` heads.

    `SelfAttentionProcessor` computes it unless another one is set. diffusers' `Attention` is the base class for the sake
    of diffusers' processors, which read many of its attributes.
    """

    _default_processor_cls = SelfAttentionProcessor

    def __init__(
        self, channels: int, head_dim: int, *, groups: int | None, eps: float, output_scale_factor: float = 1.0
    ):
        if head_dim > channels:
            raise ValueError(f"attention_head_dim must be at most the number of channels, {channels}, got {head_dim}.")
        # The last option makes diffusers read the keys of old checkpoints: query, key, value, proj_attn (seen in 0.42).
        options = {"bias": True, "residual_connection": True, "_from_deprecated_attn_block": True}
        options |= {"rescale_output_factor": output_scale_factor, "processor": SelfAttentionProcessor()}
        heads = channels // head_dim
        super().__init__(channels, heads=heads, dim_head=head_dim, norm_num_groups=groups, eps=eps, **options)

    def set_attention_slice(self, slice_size: int | None) -> None:
        """For diffusers' pipelines. No effect: attention here never stores a whole (H·W, H·W) matrix."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.processor(self, x)


class Stage(nn.Module):
    """The layers at one resolution: residual blocks, each followed by an attention block if there are any."""

    def __init__(self, resnets: list[ResnetBlock], attentions: list[AttentionBlock]):
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        self.gradient_checkpointing = False

    def resnet(self, i: int, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # Set by diffusers' enable_gradient_checkpointing() (seen in diffusers 0.42).
            return self._gradient_checkpointing_func(self.resnets[i], x, temb)
        return self.resnets[i](x, temb)

    def attention(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return self.attentions[i](x) if self.attentions else x


class DownStage(Stage):
    """Layers, then downsampling. Returns the result and every intermediate image, for the skip connections."""

    def __init__(self, resnets: list, attentions: list, downsamplers: list):
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList(downsamplers)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.attention(i, self.resnet(i, x, temb))
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x, temb)
            skips.append(x)
        return x, skips


class MidStage(Stage):
    """A residual block, an optional attention block, a residual block."""

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return self.resnet(1, self.attention(0, self.resnet(0, x, temb)), temb)


class UpStage(Stage):
    """Layers, each with its input concatenated with a skip connection, then upsampling."""

    def __init__(self, resnets: list, attentions: list, upsamplers: list):
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList(upsamplers)

    def forward(self, x: torch.Tensor, skips: list[torch.Tensor], temb: torch.Tensor) -> torch.Tensor:
        for i, skip in enumerate(skips):
            x = torch.cat([x, skip], dim=1)
            x = self.attention(i, self.resnet(i, x, temb))
        return self.upsamplers[0](x, temb) if self.upsamplers else x
