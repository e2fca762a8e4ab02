"""The blocks of the U-Net. Module names are diffusers', since they are the keys of its checkpoints.

Images are (B, C, H, W), in channels-last memory. `temb` is the activated time embedding, (B, D) or (1, D) when the
whole batch shares one timestep.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.models.activations import get_activation
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn


def sinusoidal_embedding(t: torch.Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> torch.Tensor:
    """(B,) timesteps to (B, dim) sines and cosines with wavelengths from 2π to 20000π (Attention is all you need,
    3.5); float32."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / (half - freq_shift))
    angle = t[:, None].float() * exponent.exp()[None, :]
    parts = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


class SinusoidalProjection(nn.Module):
    """`sinusoidal_embedding` as a module; no weights."""

    def __init__(self, dim: int, flip_sin_to_cos: bool, freq_shift: float):
        super().__init__()
        self.dim, self.flip_sin_to_cos, self.freq_shift = dim, flip_sin_to_cos, freq_shift

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return sinusoidal_embedding(t, self.dim, self.flip_sin_to_cos, self.freq_shift)


class FourierProjection(nn.Module):
    """Random Fourier features of log t (Song et al. 2021): fixed frequencies, saved with the weights."""

    def __init__(self, dim: int, scale: float = 16.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim) * scale, requires_grad=False)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angle = t.log()[:, None] * self.weight[None, :] * (2 * math.pi)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class SiLU(nn.SiLU):
    """x·σ(x). Writes over x where no gradient is recorded: fresh memory takes longer than the function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())


def make_activation(act_fn: str) -> nn.Module:
    """The activation that diffusers calls `act_fn`, for values that nothing else reads."""
    activation = get_activation(act_fn)
    return SiLU() if isinstance(activation, nn.SiLU) else activation


class EmbeddingMLP(nn.Module):
    """Two linear layers with SiLU between: (B, in) to (B, D)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Downsample(nn.Module):
    """Half the size by a 3×3 convolution of stride 2; padding 0 pads one pixel at the right and the bottom."""

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
# Summing the weights costs as much as it spares at about this many source pixels (measured, CPU).
_PIXELS_WORTH_SUMMING = 256


class UpsampleConv2d(nn.Conv2d):
    """Twice the size by repeating pixels, then a 3×3 convolution.

    Every source pixel is repeated, so that its 3×3 products share factors: one transposed convolution of stride 2 with
    a 4×4 kernel of summed weights is the same function in 16 products a source pixel where there were 36.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        if x.device.type != "cpu" or self.weight.dtype.itemsize < 4 or pixels < _PIXELS_WORTH_SUMMING:
            return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        C = self.out_channels
        weight = _KERNEL_SUMS.to(self.weight.dtype) @ self.weight.permute(2, 3, 1, 0).reshape(9, C * C)
        # Laid out as the convolution wants it, which would take several times as long to do so itself.
        weight = weight.view(4, 4, C, C).permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(x, weight, self.bias, stride=2, padding=1)


class Upsample(nn.Module):
    """`UpsampleConv2d` under the key that diffusers gives it."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = UpsampleConv2d(channels)

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        return self.conv(x)


class ResnetBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))) + temb))), the shortcut a 1×1 convolution where channels change.

    With `scale_shift` the embedding scales and shifts the second norm's output instead of being added before it.
    `resample` ("up" or "down") halves or doubles both branches after the first activation. Additions go into the
    convolutions' results, which no gradient needs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        *,
        groups: int,
        eps: float,
        act_fn: str,
        dropout: float,
        scale_shift: bool,
        output_scale_factor: float = 1.0,
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
    """What `AttentionBlock` does, through the attention backend chosen (`set_attention_backend`; else PyTorch's own).

    Queries, keys and values stay as the products leave them, (B, H·W, heads, d): no copy in channels-last memory.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "AttentionBlock", x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        h = x if attn.group_norm is None else attn.group_norm(x)
        h = h.permute(0, 2, 3, 1).reshape(B, H * W, C)
        parts = (
            attn.to_qkv(h).chunk(3, dim=-1) if attn.fused_projections else (attn.to_q(h), attn.to_k(h), attn.to_v(h))
        )
        q, k, v = (part.unflatten(-1, (attn.heads, -1)) for part in parts)
        h = dispatch_attention_fn(q, k, v, backend=self._attention_backend).flatten(2)
        h = x + attn.to_out[0](h).reshape(B, H, W, C).permute(0, 3, 1, 2)
        return h if attn.rescale_output_factor == 1.0 else h / attn.rescale_output_factor


class AttentionBlock(nn.Module, AttentionModuleMixin):
    """x + out(attention(norm(x))) over the H·W pixels, `channels // head_dim` heads.

    The processor does it: `SelfAttentionProcessor`, or one of diffusers', which find here what they look for.
    """

    # diffusers reads the old keys (query, key, value, proj_attn) into modules that say this.
    _from_deprecated_attn_block = True
    _default_processor_cls = SelfAttentionProcessor
    # What diffusers' processors ask of diffusers' own attention, besides what is set below.
    use_bias = residual_connection = True
    is_cross_attention = upcast_attention = upcast_softmax = norm_cross = False
    spatial_norm = norm_q = norm_k = None

    def __init__(
        self, channels: int, head_dim: int, *, groups: int | None, eps: float, output_scale_factor: float = 1.0
    ):
        super().__init__()
        self.heads = channels // head_dim
        if self.heads == 0:
            raise ValueError(f"attention_head_dim={head_dim} is larger than the {channels} channels it divides.")
        self.rescale_output_factor, self.scale = output_scale_factor, head_dim**-0.5
        inner = self.heads * head_dim
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps) if groups is not None else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, inner) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, channels), nn.Identity()])
        self.processor = SelfAttentionProcessor()

    def set_attention_slice(self, slice_size: int | None) -> None:
        """Accepted for diffusers' tools. Attention here never holds a whole (H·W, H·W) matrix: nothing to slice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.processor(self, x)


class Stage(nn.Module):
    """The layers at one resolution: residual blocks, each followed by attention or not."""

    def __init__(self, resnets: list[ResnetBlock], attentions: list[AttentionBlock]):
        super().__init__()
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        self.has_attention = bool(attentions)
        self.gradient_checkpointing = False

    def resnet(self, i: int, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self.resnets[i], x, temb)
        return self.resnets[i](x, temb)

    def attention(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return self.attentions[i](x) if self.has_attention else x


class DownStage(Stage):
    """Layers, then half the size. Gives the result and every intermediate image, for the skips."""

    def __init__(self, resnets: list, attentions: list, downsampler: nn.Module | None):
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList([downsampler]) if downsampler is not None else None

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.attention(i, self.resnet(i, x, temb))
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x, temb)
            skips.append(x)
        return x, skips


class MidStage(Stage):
    """A residual block, attention or not, a residual block."""

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return self.resnet(1, self.attention(0, self.resnet(0, x, temb)), temb)


class UpStage(Stage):
    """Layers, each fed its skip beside its input, then twice the size."""

    def __init__(self, resnets: list, attentions: list, upsampler: nn.Module | None):
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList([upsampler]) if upsampler is not None else None

    def forward(self, x: torch.Tensor, skips: list[torch.Tensor], temb: torch.Tensor) -> torch.Tensor:
        for i, skip in enumerate(skips):
            x = torch.cat([x, skip], dim=1)
            x = self.attention(i, self.resnet(i, x, temb))
        return x if self.upsamplers is None else self.upsamplers[0](x, temb)
