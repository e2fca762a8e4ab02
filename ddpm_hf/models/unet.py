"""UNet2DModelCustom: the noise predictor of DDPM, in and out of diffusers' checkpoints."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.activations import get_activation
from diffusers.models.attention import AttentionMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from ddpm_hf.interop import SavesAsStock, refuse_pickle
from ddpm_hf.models.layers import (
    AttentionBlock,
    Downsample,
    DownStage,
    EmbeddingMLP,
    FourierProjection,
    MidStage,
    ResnetBlock,
    SiLU,
    SinusoidalProjection,
    Upsample,
    UpStage,
)

# Block type -> (has attention, how it resamples; None: as downsample_type or upsample_type says).
DOWN_BLOCK_TYPES = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
UP_BLOCK_TYPES = {
    "UpBlock2D": (False, "conv"),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, "resnet"),
}


class UNet2DModelCustom(SavesAsStock, ModelMixin, AttentionMixin, PeftAdapterMixin, ConfigMixin):
    """A U-Net that maps (x_t, t) to a prediction of x_t's shape (DDPM, appendix B).

    Constructor arguments, defaults, configuration file and state-dict keys are those of `diffusers.UNet2DModel`, and
    so is the function computed. Block types: the keys of `DOWN_BLOCK_TYPES` and `UP_BLOCK_TYPES`. Weights and images are
    in channels-last memory. Attention processors and backends, fused projections (for inference), and LoRA adapters
    (`add_adapter`, through peft) are diffusers' own.

    Args beyond stock's:
        zero_init_output: start with the last convolution of every residual block, of attention and of the network
            at zero, as DDPM does: the first prediction is 0. Matters for a fresh model only and is not saved.

    Raises ValueError for a combination of arguments that makes no U-Net, naming the argument.
    """

    stock_class = UNet2DModel
    own_arguments = ("zero_init_output",)
    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock", "AttentionBlock"]
    _repeated_blocks = ["ResnetBlock", "AttentionBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        zero_init_output: bool = False,
    ):
        super().__init__()
        _check_arguments(self.config)
        channels = list(block_out_channels)
        temb_channels = time_embedding_dim or channels[0] * 4
        resnet = partial(
            ResnetBlock,
            temb_channels=temb_channels,
            groups=norm_num_groups,
            eps=norm_eps,
            act_fn=act_fn,
            dropout=dropout,
            scale_shift=resnet_time_scale_shift == "scale_shift",
        )

        def attention(c: int, groups: int | None = norm_num_groups, scale: float = 1.0) -> AttentionBlock:
            return AttentionBlock(c, attention_head_dim or c, groups=groups, eps=norm_eps, output_scale_factor=scale)

        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)

        if time_embedding_type == "fourier":
            self.time_proj, features = FourierProjection(channels[0]), 2 * channels[0]
        elif time_embedding_type == "learned":
            self.time_proj, features = nn.Embedding(num_train_timesteps, channels[0]), channels[0]
        else:
            self.time_proj, features = SinusoidalProjection(channels[0], flip_sin_to_cos, freq_shift), channels[0]
        self.time_embedding = EmbeddingMLP(features, temb_channels)
        self.temb_act = get_activation(act_fn)

        self.class_embedding = None
        if class_embed_type == "timestep":
            self.class_embedding = EmbeddingMLP(features, temb_channels)
        elif class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, temb_channels)

        # The U: down, recording the channels of every skip; across; up, taking the skips back.
        last = len(channels) - 1
        skip_channels, c_in = [channels[0]], channels[0]
        self.down_blocks = nn.ModuleList()
        for i, (kind, c) in enumerate(zip(down_block_types, channels)):
            has_attention, resample = DOWN_BLOCK_TYPES[_block_name(kind)]
            resnets = [resnet(c_in if j == 0 else c, c) for j in range(layers_per_block)]
            attentions = [attention(c) for _ in resnets] if has_attention else []
            sampler = None
            if i < last:
                as_resnet = (resample or downsample_type) == "resnet"
                sampler = resnet(c, c, resample="down") if as_resnet else Downsample(c, downsample_padding)
            self.down_blocks.append(DownStage(resnets, attentions, sampler))
            skip_channels += [c] * (layers_per_block + (i < last))
            c_in = c

        self.mid_block = None
        if mid_block_type is not None:
            resnets = [resnet(c_in, c_in, output_scale_factor=mid_block_scale_factor) for _ in range(2)]
            groups = attn_norm_num_groups or (norm_num_groups if resnet_time_scale_shift == "default" else None)
            attentions = [attention(c_in, groups, mid_block_scale_factor)] if add_attention else []
            self.mid_block = MidStage(resnets, attentions)

        self.up_blocks = nn.ModuleList()
        for i, (kind, c) in enumerate(zip(up_block_types, reversed(channels))):
            has_attention, resample = UP_BLOCK_TYPES[_block_name(kind)]
            resnets = []
            for _ in range(layers_per_block + 1):
                resnets.append(resnet(c_in + skip_channels.pop(), c))
                c_in = c
            attentions = [attention(c) for _ in resnets] if has_attention else []
            sampler = None
            if i < last:
                as_resnet = (resample or upsample_type) == "resnet"
                sampler = resnet(c, c, resample="up") if as_resnet else Upsample(c)
            self.up_blocks.append(UpStage(resnets, attentions, sampler))

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[0], eps=norm_eps)
        self.conv_act = SiLU()
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        if zero_init_output:
            self.zero_init_output()
        # Convolutions of channels-last images copy weights that are laid out otherwise, every time.
        self.to(memory_format=torch.channels_last)

    @property
    def size_multiple(self) -> int:
        """Height and width of the input must be multiples of this: every level but the last halves them."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def zero_init_output(self) -> None:
        """Set the last convolution of every residual branch, and of the network, to zero."""
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                nn.init.zeros_(module.conv2.weight), nn.init.zeros_(module.conv2.bias)
            elif isinstance(module, AttentionBlock):
                nn.init.zeros_(module.to_out[0].weight), nn.init.zeros_(module.to_out[0].bias)
        nn.init.zeros_(self.conv_out.weight), nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """The prediction at x_t = `sample` (B, C, H, W) and t = `timestep` (a number, a 0-d tensor or (B,)).

        Returns `UNet2DOutput(sample)` of shape (B, out_channels, H, W), or a tuple of it. Raises ValueError for an
        image size that cannot be halved often enough, and for labels that are missing, not wanted or out of range.
        """
        t = timestep if torch.is_tensor(timestep) else torch.tensor([timestep], device=sample.device)
        t = t.reshape(-1).to(sample.device)
        self._check_inputs(sample, t, class_labels)
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        temb = self.temb_act(self.embed(t, class_labels, sample.dtype))

        x = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for down in self.down_blocks:
            x, outputs = down(x, temb)
            skips += outputs
        if self.mid_block is not None:
            x = self.mid_block(x, temb)
        for up in self.up_blocks:
            x = up(x, [skips.pop() for _ in up.resnets], temb)
        x = self.conv_out(self.conv_act(self.conv_norm_out(x))).contiguous()

        if self.config.time_embedding_type == "fourier":
            x = x / t.reshape(-1, 1, 1, 1)
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def embed(self, t: torch.Tensor, class_labels: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Embedding (n, D) of timesteps t (n,), n being 1 when the batch shares one, plus that of the labels (B,).

        `dtype` is the network's: asking diffusers for it walks all of the modules.
        """
        emb = self.time_embedding(self.time_proj(t).to(dtype))
        if self.class_embedding is None:
            return emb
        if self.config.class_embed_type == "timestep":
            class_labels = self.time_proj(class_labels).to(dtype)
        return emb + self.class_embedding(class_labels).to(dtype)

    def _check_inputs(self, sample: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> None:
        """ValueError for what does not fit the network. Looks at values only where that stalls no device or graph."""
        multiple, channels = self.size_multiple, self.config.in_channels
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"sample must have shape (B, {channels}, H, W), got {tuple(sample.shape)}.")
        if sample.shape[-2] % multiple or sample.shape[-1] % multiple:
            raise ValueError(
                f"height and width must be multiples of {multiple} for a U-Net of {len(self.down_blocks)} levels, "
                f"got {sample.shape[-2]}×{sample.shape[-1]}."
            )
        lengths = (1, sample.shape[0])
        if t.shape[0] not in lengths:
            raise ValueError(f"timestep must be one, or {lengths[1]} (one per image), got {t.shape[0]}.")
        if (class_labels is None) != (self.class_embedding is None):
            if class_labels is None:
                raise ValueError("this model is class-conditional: class_labels must be given.")
            raise ValueError("class_labels were given, but this model is unconditional (num_class_embeds is None).")
        if class_labels is not None and (class_labels.ndim == 0 or class_labels.shape[0] not in lengths):
            raise ValueError(
                f"class_labels must hold one per image, {lengths[1]}, got shape {tuple(class_labels.shape)}."
            )
        for name, index, table in (
            ("timestep", t, self.time_proj),
            ("class_labels", class_labels, self.class_embedding),
        ):
            if not isinstance(table, nn.Embedding):
                continue
            if index.is_floating_point() or index.ndim != 1:
                raise ValueError(f"{name} must be (B,) integers, got {index.dtype} of shape {tuple(index.shape)}.")
            if index.device.type != "cpu" or torch.compiler.is_compiling():
                continue
            if ((index < 0) | (index >= table.num_embeddings)).any():
                raise ValueError(f"{name} must lie in 0..{table.num_embeddings - 1}, got {index.tolist()}.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs):
        """`ModelMixin.from_pretrained`, the weights laid out for channels-last images."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        if getattr(model, "hf_device_map", None) is None:  # weights may wait on a disk
            model.to(memory_format=torch.channels_last)
        return loaded

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Write weights and configuration as stock does; pickled weights (`safe_serialization=False`) are refused.

        A save replaces the one that lay there: stock leaves the index of a sharded one behind, whose shards it
        removed, and the folder cannot be loaded any more.
        """
        refuse_pickle(safe_serialization)
        if any(getattr(module, "fused_projections", False) for module in self.modules()):
            raise ValueError(
                "fused projections are no part of a checkpoint: call unfuse_qkv_projections() before saving."
            )
        if is_main_process:
            suffix = f".{variant}" if variant else ""
            (Path(save_directory) / f"diffusion_pytorch_model.safetensors.index{suffix}.json").unlink(missing_ok=True)
        super().save_pretrained(
            str(save_directory),
            is_main_process=is_main_process,
            save_function=save_function,
            variant=variant,
            max_shard_size=max_shard_size,
            push_to_hub=push_to_hub,
            **kwargs,
        )


def _block_name(kind: str) -> str:
    return kind.removeprefix("UNetRes")


def _check_arguments(config) -> None:
    """ValueError for arguments that make no U-Net; all before a weight is made."""
    for name, known in (("down_block_types", DOWN_BLOCK_TYPES), ("up_block_types", UP_BLOCK_TYPES)):
        if unknown := [k for k in config[name] if _block_name(k) not in known]:
            raise ValueError(f"{name}: {unknown} not supported; supported are {list(known)}.")
        if len(config[name]) != len(config.block_out_channels):
            raise ValueError(
                f"{name} must have one entry per entry of block_out_channels {tuple(config.block_out_channels)}, "
                f"got {tuple(config[name])}."
            )
    choices = {
        "mid_block_type": ("UNetMidBlock2D", None),
        "time_embedding_type": ("positional", "fourier", "learned"),
        "class_embed_type": (None, "timestep", "identity"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "downsample_type": ("conv", "resnet", None),
        "upsample_type": ("conv", "resnet", None),
        "downsample_padding": (0, 1),
    }
    for name, allowed in choices.items():
        if config[name] not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {config[name]!r}.")
    if config.time_embedding_type == "learned" and config.num_train_timesteps is None:
        raise ValueError("time_embedding_type='learned' needs num_train_timesteps.")
    groups = config.norm_num_groups
    if not isinstance(groups, int) or groups < 1 or any(c % groups for c in config.block_out_channels):
        raise ValueError(
            "norm_num_groups must be an integer that divides each of block_out_channels "
            f"{tuple(config.block_out_channels)}, got {groups!r}."
        )
    if config.attn_norm_num_groups and config.block_out_channels[-1] % config.attn_norm_num_groups:
        raise ValueError(
            f"attn_norm_num_groups must divide the middle's {config.block_out_channels[-1]} channels, "
            f"got {config.attn_norm_num_groups}."
        )
