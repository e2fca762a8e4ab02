"""The options of a conversion, and the rules between them. Imports no torch, so that --help answers at once."""

from dataclasses import MISSING, dataclass
from typing import Literal

from ddpm_hf.options import check_options, option

Source = Literal["improved-diffusion", "guided-diffusion", "pytorch_diffusion", "pytorch-ddpm", "ddpm-torch"]
OPENAI = ("improved-diffusion", "guided-diffusion")
# Of a model that is told t·1000/T instead of t.
TOLD_T = 1000


@dataclass
class ConvertOptions:
    """Every option of `training/convert.py`: what a checkpoint does not say about its model."""

    checkpoint: str = option(MISSING, "file of weights: .safetensors, or one that torch.save wrote")
    source: Source = option(MISSING, "repository whose code trained it")
    output_dir: str = option(MISSING, "folder for the pipeline")
    resolution: int = option(MISSING, "height and width of the images", "[1, 65536]")
    weights: Literal["ema", "model"] | None = option(
        None, "which weights, of a checkpoint that has both; None: the averaged ones"
    )
    num_heads: int | None = option(None, "attention heads, of OpenAI's two repositories", "[1, inf)")
    num_head_channels: int | None = option(None, "channels per head, instead of num_heads", "[1, inf)")
    use_new_attention_order: bool = option(False, "guided-diffusion's option of this name")
    num_train_timesteps: int = option(1000, "length T of the chain, diffusion_steps at OpenAI", "[1, 100000]")
    noise_schedule: Literal["linear", "cosine", "quad", "warmup10", "warmup50", "const", "jsd"] = option(
        "linear", "schedule as the source calls it; 'linear' of OpenAI's has its range multiplied by 1000/T"
    )
    beta_start: float = option(1e-4, "β of the first step, in schedules that have a range", "(0, 1)")
    beta_end: float = option(0.02, "β of the last step, in schedules that have a range", "(0, 1)")
    rescale_timesteps: bool | None = option(
        None,
        "the network is told t·1000/T; None: as by default in OpenAI's code: yes in improved-diffusion, no in guided",
    )
    prediction_type: Literal["epsilon", "sample"] = option("epsilon", "what the network predicts")
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] | None = option(
        None,
        "variance of the reverse steps; None: learned_range if the network predicts it, or else the source's default",
    )

    def __post_init__(self):
        check_options(self)
        is_openai = self.source in OPENAI
        for name in ("num_heads", "num_head_channels", "use_new_attention_order", "rescale_timesteps"):
            if not is_openai and getattr(self, name):
                raise ValueError(f"{name} = {getattr(self, name)} is for {' and '.join(OPENAI)} only: leave it out.")
        if is_openai and (self.num_heads is None) == (self.num_head_channels is None):
            given = f"num_heads = {self.num_heads} and num_head_channels = {self.num_head_channels}"
            raise ValueError(f"{self.source} needs num_heads or num_head_channels, as in its training, got {given}.")
        if self.source == "improved-diffusion" and (self.num_head_channels or self.use_new_attention_order):
            raise ValueError("num_head_channels and use_new_attention_order are for guided-diffusion only.")
        if self.is_told_other_timesteps and self.num_train_timesteps % TOLD_T:
            problem = f"a network that is told t·{TOLD_T}/T needs a T that is a multiple of {TOLD_T}"
            raise ValueError(
                f"num_train_timesteps = {self.num_train_timesteps}: {problem}; or rescale_timesteps false."
            )

    @property
    def is_told_other_timesteps(self) -> bool:
        """Whether the network is told t·1000/T, which is not t."""
        default = self.source == "improved-diffusion"
        rescales = default if self.rescale_timesteps is None else self.rescale_timesteps
        return rescales and self.num_train_timesteps != TOLD_T
