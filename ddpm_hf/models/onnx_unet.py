"""OnnxUNet: a network in an ONNX file, computed by ONNX Runtime, in the place of `UNet2DModelCustom` for sampling.

`ddpm_hf.export` writes such files. Nothing here needs the packages onnx and onnxscript.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

ONNX_FOLDER = "onnx"
VARIANTS = ("fp16", "int8")
INSTALL = "pip install ddpm_hf[export]"


def onnx_name(variant: str | None = None) -> str:
    """The name of the file in a model's folder: onnx/model.onnx, onnx/model_fp16.onnx, ..."""
    return f"{ONNX_FOLDER}/model{f'_{variant}' if variant else ''}.onnx"


class OnnxUNet(nn.Module):
    """A network without weights of PyTorch, called as `UNet2DModelCustom` is. It runs on the CPU, and has no gradients.

    Args:
        file: an ONNX file that `ddpm_hf.export` wrote.

    Attributes:
        config: the configuration of the network that was exported.
        facts: what the file records about the model, by name.

    Raises ImportError without onnxruntime, FileNotFoundError for a file that is not there, and ValueError for another file.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, file: str | Path):
        super().__init__()
        self.session = open_session(file)
        facts = self.session.get_modelmeta().custom_metadata_map
        if "unet_config" not in facts:
            raise ValueError(f"{file} must be a file that ddpm-export wrote, got one without its metadata.")
        self.facts: dict[str, Any] = {name: json.loads(value) for name, value in facts.items()}
        self.config = FrozenDict(self.facts["unet_config"])
        self._types = {i.name: np.int64 if "int64" in i.type else np.float32 for i in self.session.get_inputs()}

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """The network's prediction, as `UNet2DModelCustom.forward`. Raises ValueError for inputs that do not fit."""
        given = {"sample": sample, "timestep": torch.as_tensor(timestep).reshape(-1), "class_labels": class_labels}
        if "guidance_scale" in self._types:
            given["guidance_scale"] = torch.ones(())  # guidance is the caller's
        known = {name: value for name, value in given.items() if value is not None}
        if known.keys() != self._types.keys():
            raise ValueError(f"the network takes {sorted(self._types)}, got {sorted(known)}.")
        arrays = {name: value.numpy(force=True).astype(self._types[name], copy=False) for name, value in known.items()}
        try:
            (prediction,) = self.session.run(None, arrays)
        except Exception as error:  # onnxruntime has a class of its own for each kind
            raise ValueError(f"ONNX Runtime refuses inputs of the shapes {_shapes(known)}: {error}") from error
        prediction = torch.from_numpy(prediction)
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)


def open_session(file: str | Path):
    """The file in ONNX Runtime, on the CPU, with PyTorch's number of threads."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"the backend onnxruntime is not installed: {INSTALL}") from error
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist: write it with ddpm-export.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each kind
        raise ValueError(f"{file} cannot be read by ONNX Runtime: {error}") from error


def _shapes(tensors: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
