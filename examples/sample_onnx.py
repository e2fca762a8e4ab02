"""Sample from a model that ddpm-export wrote, with onnxruntime, numpy and Pillow alone:

python sample_onnx.py outputs/mnist/onnx/model.onnx --label 7 --guidance 2 --steps 50 --seed 0 --number 8 --output sevens.png
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image


def sample(session: onnxruntime.InferenceSession, label: int, guidance: float, steps: int, seed: int, number: int):
    """Images (number, H, W, C) in [0, 1], by DDIM with η = 0 (Song et al. 2021, eq. 12)."""
    facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    bars, T = np.array(facts["alphas_cumprod"]), facts["num_train_timesteps"]
    H, W = facts["sample_size"]
    C, limit = facts["channels"], facts["clip_sample_range"]
    inputs = {i.name for i in session.get_inputs()}
    fixed = {"class_labels": np.array([label]), "guidance_scale": np.array(guidance, np.float32)}
    fixed = {name: value for name, value in fixed.items() if name in inputs}
    x = np.random.default_rng(seed).standard_normal((number, C, H, W))
    timesteps = np.round(T - np.arange(steps) * T / steps).astype(int) - 1
    for t, s in zip(timesteps, [*timesteps[1:], None]):
        given = {"sample": x.astype(np.float32), "timestep": np.array([t], np.float32)}
        output = session.run(None, given | fixed)[0][:, :C].astype(float)
        signal, noise = np.sqrt(bars[t]), np.sqrt(1 - bars[t])
        if facts["prediction_type"] == "sample":
            x_0 = output
        elif facts["prediction_type"] == "epsilon":
            x_0 = (x - noise * output) / signal
        else:  # v
            x_0 = signal * x - noise * output
        epsilon = (x - signal * x_0) / noise
        x_0 = x_0 if limit is None else x_0.clip(-limit, limit)
        x = x_0 if s is None else np.sqrt(bars[s]) * x_0 + np.sqrt(1 - bars[s]) * epsilon
    return (x.transpose(0, 2, 3, 1) / 2 + 0.5).clip(0, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    for name, default in {"label": 0, "guidance": 1.0, "steps": 50, "seed": 0, "number": 8}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--output", default="samples.png")
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.model)
    images = sample(session, args.label, args.guidance, args.steps, args.seed, args.number)
    row = np.round(255 * np.concatenate(list(images), axis=1)).astype(np.uint8)
    Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row).save(args.output)
