"""UNet2DModelCustom: the U-Net of DDPM, compatible with checkpoints of diffusers' UNet2DModel."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.activations import get_activation
from diffusers.models.attention import AttentionMixin
from diffusers.models.model_loading_utils import load_state_dict
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from ddpm_hf.checks import check_choice
from ddpm_hf.interop import SavesAsStock, refuse_pickle
from ddpm_hf.model_files import WEIGHTS_NAME, check_shard_index, check_weights, class_name, explain_unreadable
from ddpm_hf.models.builders import build_embeddings, build_stages, check_arguments
from ddpm_hf.models.layers import AttentionBlock, ResnetBlock, SiLU


class UNet2DModelCustom(SavesAsStock, ModelMixin, AttentionMixin, PeftAdapterMixin, ConfigMixin):
    """A U-Net that predicts noise, x_0 or v from (x_t, t) (DDPM, appendix B).

    Constructor arguments, defaults, configuration file, state-dict keys and the computed function are those of
    `diffusers.UNet2DModel`. Supported block types are the keys of `DOWN_BLOCK_TYPES` and `UP_BLOCK_TYPES` in
    `builders.py`. Attention processors and backends, fused projections (for inference), and LoRA adapters (`add_adapter`,
    with peft) work as in diffusers.

    Weights and images are in channels-last memory. `safetensors.torch.save_model(unet, file)` therefore saves the weights,
    while `save_file(unet.state_dict(), file)` of safetensors refuses tensors that are not contiguous.

    Args in addition to those of `UNet2DModel`:
        zero_init_output: initialize the last convolution of every residual block, of attention and of the network to
            zero, as DDPM does, so that the first prediction is 0. This is the only difference from PyTorch's default
            initialization. Not saved: it has no effect on loaded weights.

    Raises ValueError or TypeError, naming the argument, if the arguments do not describe a U-Net.
    """

    stock_class = UNet2DModel
    own_arguments = ("zero_init_output",)
    # Class attributes that diffusers asks a model to define (seen in diffusers 0.42).
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
        check_arguments(self.config)
        # Parts are created in stock's order, so that a seed gives the random weights of stock.
        # Numbers are read from the configuration, where those of NumPy are Python's.
        config, channels = self.config, self.config.block_out_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels, 3, padding=1)
        self.time_proj, self.time_embedding, self.class_embedding = build_embeddings(config)
        self.temb_act = get_activation(config.act_fn)
        self.down_blocks, self.mid_block, self.up_blocks = build_stages(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels, eps=config.norm_eps)
        self.conv_act = SiLU()
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)
        if zero_init_output:
            self.zero_init_output()
        # Convolutions of channels-last images would otherwise copy the weights in every call.
        self.to(memory_format=torch.channels_last)

    @property
    def size_multiple(self) -> int:
        """Height and width of the input must be multiples of this, because every level but the last halves them."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def zero_init_output(self) -> None:
        """Set the last layer of every residual branch, and of the network, to zero, as DDPM initializes them."""
        for module in self.modules():
            if isinstance(module, (ResnetBlock, AttentionBlock)):
                last = module.conv2 if isinstance(module, ResnetBlock) else module.to_out[0]
                nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        nn.init.zeros_(self.conv_out.weight), nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """The network's prediction.

        Args:
            sample: x_t, (B, C, H, W), H and W multiples of `size_multiple`.
            timestep: t, a number, a 0-d tensor or (B,).
            class_labels: (B,), for a class-conditional network; (B, D) if class_embed_type is "identity".

        Returns `UNet2DOutput(sample)` of shape (B, out_channels, H, W), or a tuple with it. Raises ValueError that names
        the argument.
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
        """The embedding (n, D) of timesteps t (n,) plus that of class labels (B,); n = 1 if the batch shares one t.

        `dtype` is that of the network, passed because `self.dtype` of diffusers searches all modules.
        """
        emb = self.time_embedding(self.time_proj(t).to(dtype))
        if self.class_embedding is None:
            return emb
        if self.config.class_embed_type == "timestep":
            class_labels = self.time_proj(class_labels).to(dtype)
        return emb + self.class_embedding(class_labels).to(dtype)

    def _check_inputs(self, sample: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> None:
        """ValueError for inputs of a wrong shape, or with values out of range where these can be read: on the CPU and
        outside a compiled graph."""
        multiple, channels, labels = self.size_multiple, self.config.in_channels, class_labels
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"sample must have shape (B, {channels}, H, W), got {tuple(sample.shape)}.")
        B, _, H, W = sample.shape
        if H % multiple or W % multiple:
            raise ValueError(f"height and width of sample must be multiples of {multiple}, got {H}×{W}.")
        # Not len(), which would fix the number of images in a program of torch.export.
        if t.shape[0] not in (1, B):
            raise ValueError(f"timestep must be one number, or {B} (one per image), got {t.shape[0]}.")
        if (labels is None) != (self.class_embedding is None):
            expected = (
                "given: this model is class-conditional" if labels is None else "None: this model is unconditional"
            )
            raise ValueError(f"class_labels must be {expected}.")
        if labels is not None and (labels.ndim == 0 or labels.shape[0] not in (1, B)):
            raise ValueError(f"class_labels must hold {B} labels, one per image, got shape {tuple(labels.shape)}.")
        for name, index, table in (("timestep", t, self.time_proj), ("class_labels", labels, self.class_embedding)):
            if not isinstance(table, nn.Embedding):
                continue
            if index.is_floating_point() or index.ndim != 1:
                raise ValueError(f"{name} must be (B,) integers, got {index.dtype} of shape {tuple(index.shape)}.")
            is_readable = index.device.type == "cpu" and not torch.compiler.is_compiling()
            if is_readable and ((index < 0) | (index >= table.num_embeddings)).any():
                raise ValueError(f"{name} must lie in 0..{table.num_embeddings - 1}, got {index.tolist()}.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs):
        """`ModelMixin.from_pretrained`, with the weights converted to channels-last memory.

        Raises ValueError, naming the file or folder, for a configuration of another network, and for weights that lack
        one, have unknown ones, have another shape, are not floating-point numbers, or are NaN or infinite; OSError, with
        the reason, for files that cannot be read.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        suffix = f".{variant}" if (variant := kwargs.get("variant")) else ""
        for index in folder.glob(f"{WEIGHTS_NAME}.*.index{suffix}.json"):
            check_shard_index(index)
        default_dtype = torch.get_default_dtype()
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            explain_unreadable(folder, error)
            raise
        finally:
            torch.set_default_dtype(default_dtype)  # diffusers leaves `torch_dtype` there after an error (seen in 0.42)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        if getattr(model, "hf_device_map", None) is None:  # with a device map, weights may be offloaded
            model.to(memory_format=torch.channels_last)
        return loaded

    @classmethod
    def _dict_from_json_file(cls, json_file) -> dict:
        config = super()._dict_from_json_file(json_file)
        names = (cls.stock_class.__name__, cls.__name__)
        check_choice(f"_class_name in {json_file}", class_name(json_file, config, cls.__name__), names)
        return config

    # Called by diffusers' from_pretrained (seen in 0.42): the first with the content of a single file of weights, the
    # second with it, or with the files of sharded weights. Stock leaves out what it does not know, casts integers, and
    # leaves a missing weight uninitialized.

    def _fix_state_dict_keys_on_load(self, state_dict: dict) -> None:
        if not isinstance(state_dict, dict):
            raise OSError(f"weights must be tensors by their names, got {type(state_dict).__name__}.")
        super()._fix_state_dict_keys_on_load(state_dict)

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, resolved_model_file, *args, **kwargs):
        if kwargs.get("hf_quantizer") is None:
            files = [state_dict] if state_dict is not None else map(load_state_dict, resolved_model_file)
            found = {name: tensor for file in files for name, tensor in file.items()}
            source = str(
                resolved_model_file[0] if len(resolved_model_file) == 1 else Path(resolved_model_file[0]).parent
            )
            check_weights(source, found, model.state_dict(), not kwargs.get("ignore_mismatched_sizes"))
        return super()._load_pretrained_model(model, state_dict, resolved_model_file, *args, **kwargs)

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
        """`ModelMixin.save_pretrained`, in safetensors only (`safe_serialization=False` raises ValueError).

        A previous save in the folder is replaced completely. Stock removes its shards, but leaves their index, with
        which the folder cannot be loaded.
        """
        refuse_pickle(safe_serialization)
        if any(getattr(module, "fused_projections", False) for module in self.modules()):
            raise ValueError("fused projections cannot be saved: call unfuse_qkv_projections() first.")
        if is_main_process:
            suffix = f".{variant}" if variant else ""
            (Path(save_directory) / f"diffusion_pytorch_model.safetensors.index{suffix}.json").unlink(missing_ok=True)
        kwargs |= {"variant": variant, "max_shard_size": max_shard_size, "push_to_hub": push_to_hub}
        super().save_pretrained(str(save_directory), is_main_process, save_function, **kwargs)
