"""The U-Net of DDPM in float64, written as functions over a dict of weights with the names of each repository.

Weights are drawn when a name is first used, so that a forward pass makes the checkpoint. The blocks are numbered by
counting, in the order in which the repositories create them.
"""

import math

import torch
import torch.nn.functional as F

GROUPS = 32


class Names:
    """Of pesser/pytorch_diffusion. Each method gives the places of a block and of its attention."""

    parts = dict(norm1="norm1", conv1="conv1", temb="temb_proj", norm2="norm2", conv2="conv2", shortcut="nin_shortcut")
    attention = dict(norm="norm", q="q", k="k", v="v", out="proj_out")
    ends = dict(
        conv_in="conv_in", linear_1="temb.dense.0", linear_2="temb.dense.1", norm_out="norm_out", conv_out="conv_out"
    )
    middle = ("mid.block_1", "mid.attn_1", "mid.block_2")
    eps, padding, shift, order = 1e-6, "end", 1, "sin cos"

    def __init__(self, layers):
        self.layers, self.count = layers, 0

    def down(self, i, j, attends):
        return f"down.{i}.block.{j}", f"down.{i}.attn.{j}"

    def downsample(self, i):
        return f"down.{i}.downsample.conv"

    def up(self, i, j, attends):
        return f"up.{i}.block.{j}", f"up.{i}.attn.{j}"

    def upsample(self, i, attends):
        return f"up.{i}.upsample.conv"

    def start_up(self):
        self.count = 0


class OpenAI(Names):
    """Of openai/improved-diffusion and guided-diffusion."""

    parts = dict(
        norm1="in_layers.0", conv1="in_layers.2", temb="emb_layers.1", norm2="out_layers.0", conv2="out_layers.3",
        shortcut="skip_connection",
    )  # fmt: skip
    attention = dict(norm="norm", qkv="qkv", out="proj_out")
    ends = dict(
        conv_in="input_blocks.0.0", linear_1="time_embed.0", linear_2="time_embed.2", norm_out="out.0", conv_out="out.2"
    )
    middle = ("middle_block.0", "middle_block.1", "middle_block.2")
    eps, padding, shift, order = 1e-5, "around", 0, "cos sin"
    resamples_in_blocks = False

    def down(self, i, j, attends):
        self.count += 1
        return f"input_blocks.{self.count}.0", f"input_blocks.{self.count}.1"

    def downsample(self, i):
        self.count += 1
        return f"input_blocks.{self.count}.0" + ("" if self.resamples_in_blocks else ".op")

    def start_up(self):
        self.count = -1

    def up(self, i, j, attends):
        self.count += 1
        return f"output_blocks.{self.count}.0", f"output_blocks.{self.count}.1"

    def upsample(self, i, attends):
        return f"output_blocks.{self.count}.{2 if attends else 1}" + ("" if self.resamples_in_blocks else ".conv")


class GuidedBlocks(OpenAI):
    """guided-diffusion with resblock_updown."""

    resamples_in_blocks = True


class PytorchDDPM(Names):
    """Of w86763777/pytorch-ddpm."""

    parts = dict(
        norm1="block1.0", conv1="block1.2", temb="temb_proj.1", norm2="block2.0", conv2="block2.3", shortcut="shortcut"
    )
    attention = dict(norm="group_norm", q="proj_q", k="proj_k", v="proj_v", out="proj")
    ends = dict(
        conv_in="head", linear_1="time_embedding.timembedding.1", linear_2="time_embedding.timembedding.3",
        norm_out="tail.0", conv_out="tail.2",
    )  # fmt: skip
    middle = ("middleblocks.0", "middleblocks.0.attn", "middleblocks.1")
    eps, padding, shift, order = 1e-5, "around", 0, "interleaved"

    def _next(self, way):
        self.count += 1
        return f"{way}blocks.{self.count - 1}"

    def down(self, i, j, attends):
        return (name := self._next("down")), f"{name}.attn"

    def downsample(self, i):
        return self._next("down") + ".main"

    def up(self, i, j, attends):
        return (name := self._next("up")), f"{name}.attn"

    def upsample(self, i, attends):
        return self._next("up") + ".main"


class DDPMTorch(Names):
    """Of tqch/ddpm-torch."""

    parts = dict(norm1="norm1", conv1="conv1", temb="fc", norm2="norm2", conv2="conv2", shortcut="skip")
    attention = dict(norm="norm", qkv="project_in", out="project_out")
    ends = dict(conv_in="in_conv", linear_1="embed.0", linear_2="embed.2", norm_out="out_conv.0", conv_out="out_conv.2")
    middle = ("middle.0", "middle.1", "middle.2")

    def _layer(self, way, i, j, attends):
        place = f"{way}samples.level_{i}.{j}"
        return (f"{place}.0", f"{place}.1") if attends else (place, "")

    def down(self, i, j, attends):
        return self._layer("down", i, j, attends)

    def downsample(self, i):
        return f"downsamples.level_{i}.{self.layers}.1"

    def up(self, i, j, attends):
        return self._layer("up", i, j, attends)

    def upsample(self, i, attends):
        return f"upsamples.level_{i}.{self.layers + 1}.1"


class Reference:
    """A network; `weights` has the names of the repository. `heads`: of each attention, interleaved as q, k, v of one
    head after the other ("heads first") or as all q, all k, all v ("parts first")."""

    def __init__(self, names, channels, attends, layers=1, heads=1, order="heads first", scale_shift=False, outputs=3):
        self.names, self.channels, self.attends, self.layers = names, channels, attends, layers
        self.heads, self.order, self.scale_shift, self.outputs = heads, order, scale_shift, outputs
        self.weights, self.random = {}, torch.Generator().manual_seed(0)

    def draw(self, name, *shape):
        scale = 1.0 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
        values = torch.randn(shape, generator=self.random, dtype=torch.float64) * scale
        return self.weights.setdefault(name, values.float()).double()  # a checkpoint is float32

    def linear(self, name, x, width):
        return F.linear(x, self.draw(f"{name}.weight", width, x.shape[1]), self.draw(f"{name}.bias", width))

    def conv(self, name, x, width, size=3, stride=1, padding=1):
        weight = self.draw(f"{name}.weight", width, x.shape[1], size, size)
        return F.conv2d(x, weight, self.draw(f"{name}.bias", width), stride, padding)

    def norm(self, name, x):
        weight, bias = self.draw(f"{name}.weight", x.shape[1]), self.draw(f"{name}.bias", x.shape[1])
        return F.group_norm(x, GROUPS, weight, bias, self.names.eps)

    def resnet(self, place, x, temb, width, resample=None):
        part = {key: f"{place}.{name}" for key, name in self.names.parts.items()}
        h = F.silu(self.norm(part["norm1"], x))
        if resample:
            x, h = resample(x), resample(h)
        h = self.conv(part["conv1"], h, width)
        emb = self.linear(part["temb"], F.silu(temb), width * (2 if self.scale_shift else 1))[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, 1)
            h = self.norm(part["norm2"], h) * (1 + scale) + shift
        else:
            h = self.norm(part["norm2"], h + emb)
        h = self.conv(part["conv2"], F.silu(h), width)
        return h + (x if x.shape[1] == width else self.conv(part["shortcut"], x, width, 1, padding=0))

    def attention(self, place, x):
        names, (B, C, H, W), heads = self.names.attention, x.shape, self.heads
        h = self.norm(f"{place}.{names['norm']}", x)
        if "qkv" in names:
            name = f"{place}.{names['qkv']}"
            joined = self.conv(name, h, 3 * C, 1, padding=0).flatten(2)
            if self.order == "heads first":
                q, k, v = joined.reshape(B, heads, 3, C // heads, H * W).unbind(2)
            else:
                q, k, v = joined.reshape(B, 3, heads, C // heads, H * W).unbind(1)
        else:
            parts = (self.conv(f"{place}.{names[n]}", h, C, 1, padding=0) for n in "qkv")
            q, k, v = (part.reshape(B, heads, C // heads, H * W) for part in parts)
        mixed = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(C // heads), -1) @ v.transpose(2, 3)
        mixed = mixed.transpose(2, 3).reshape(B, C, H, W)
        return x + self.conv(f"{place}.{names['out']}", mixed, C, 1, padding=0)

    def time_features(self, t):
        half = self.channels[0] // 2
        i = torch.arange(half, dtype=torch.float64)
        angles = t.double()[:, None] * torch.exp(-math.log(10000) * i / (half - self.names.shift))
        sin, cos = angles.sin(), angles.cos()
        if self.names.order == "interleaved":
            return torch.stack([sin, cos], -1).flatten(1)
        return torch.cat([sin, cos] if self.names.order == "sin cos" else [cos, sin], 1)

    def __call__(self, x, t, labels=None, classes=0):
        names, ends, L, n = self.names(self.layers), self.names.ends, len(self.channels), self.layers
        in_blocks = getattr(names, "resamples_in_blocks", False)
        D = 4 * self.channels[0]
        temb = self.linear(ends["linear_2"], F.silu(self.linear(ends["linear_1"], self.time_features(t), D)), D)
        if classes:
            temb = temb + self.draw("label_emb.weight", classes, D)[labels]
        x = self.conv(ends["conv_in"], x, self.channels[0])
        skips = [x]
        for i, width in enumerate(self.channels):
            for j in range(n):
                place, attention = names.down(i, j, self.attends[i])
                x = self.resnet(place, x, temb, width)
                x = self.attention(attention, x) if self.attends[i] else x
                skips.append(x)
            if i < L - 1:
                place = names.downsample(i)
                if in_blocks:
                    x = self.resnet(place, x, temb, width, lambda y: F.avg_pool2d(y, 2))
                elif names.padding == "end":
                    x = self.conv(place, F.pad(x, (0, 1, 0, 1)), width, stride=2, padding=0)
                else:
                    x = self.conv(place, x, width, stride=2)
                skips.append(x)
        first, attention, second = names.middle
        x = self.resnet(second, self.attention(attention, self.resnet(first, x, temb, width)), temb, width)
        names.start_up()
        for i in reversed(range(L)):
            for j in range(n + 1):
                place, attention = names.up(i, j, self.attends[i])
                x = self.resnet(place, torch.cat([x, skips.pop()], 1), temb, self.channels[i])
                x = self.attention(attention, x) if self.attends[i] else x
            if i > 0:
                place = names.upsample(i, self.attends[i])
                if in_blocks:
                    x = self.resnet(place, x, temb, self.channels[i], lambda y: F.interpolate(y, scale_factor=2.0))
                else:
                    x = self.conv(place, F.interpolate(x, scale_factor=2.0), self.channels[i])
        return self.conv(ends["conv_out"], F.silu(self.norm(ends["norm_out"], x)), self.outputs)
