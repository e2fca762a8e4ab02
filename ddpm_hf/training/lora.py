"""Fine-tuning by LoRA (Hu et al. 2022), with peft: a run trains small factors of the changes of weights, not the weights."""

from pathlib import Path

from ddpm_hf import UNet2DModelCustom
from ddpm_hf.files import atomic_folder
from ddpm_hf.training.base_model import network_arguments
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.ema import trained_parameters

LAYERS = ["conv1", "conv2", "to_q", "to_k", "to_v", "to_out.0"]  # of residual and attention layers
FOLDER = "lora"  # of the adapters in the output folder


def add_lora(unet: UNet2DModelCustom, config: TrainingConfig) -> None:
    """Freeze a network and add the adapters of a run: W becomes W + B A, with A of `lora_rank` rows.

    B starts at zero, so that the first prediction is that of the frozen network. Raises ValueError if peft is not
    installed, and for a network with other classes than its base model, since adapters hold no embeddings.
    """
    base = network_arguments(config.init_from)
    if any(base[name] != unet.config[name] for name in ("num_class_embeds", "class_embed_type")):
        problem = f"lora_rank = {config.lora_rank} trains no embeddings, and init_from = {config.init_from!r} has other"
        raise ValueError(f"{problem} classes than this run. Leave out lora_rank, or the options of labels.")
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(f'lora_rank = {config.lora_rank} needs peft: pip install "peft>=0.17".') from error
    unet.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=LAYERS))


def save_and_merge_lora(unet: UNet2DModelCustom, output_dir: Path) -> None:
    """Write the adapters into `output_dir/lora`, whole or not at all, then add them to the weights and remove them."""
    for adapter in trained_parameters(unet).values():
        adapter.data = adapter.data.contiguous()  # safetensors writes no channels-last weights
    with atomic_folder(output_dir / FOLDER) as staged:
        unet.save_lora_adapter(staged)
    unet.fuse_lora()
    unet.unload_lora()
