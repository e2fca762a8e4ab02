"""Serve images of a model that ddpm-export wrote, with onnxruntime, numpy and Pillow alone:

    python serve_onnx.py outputs/mnist --port 8000

The model is a folder that has onnx/model.onnx, or user/name on the Hub, which needs huggingface_hub too.
GET /?label=7&guidance=2&steps=20&seed=3&number=4 answers with a picture, GET /health with "ok".
"""

import argparse
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import onnxruntime
from PIL import Image
from sample_onnx import sample

DEFAULTS = {"label": 0, "guidance": 1.0, "steps": 20, "seed": 0, "number": 1}
LIMITS = {"label": (0, 10**6), "guidance": (-10, 10), "steps": (1, 250), "seed": (0, 2**63), "number": (1, 16)}


def arguments_of(query: str) -> dict:
    """The arguments of `sample`. Raises ValueError for unknown names and for values out of range."""
    given = {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True).items()}
    if unknown := given.keys() - DEFAULTS.keys():
        raise ValueError(f"unknown {sorted(unknown)}: give {', '.join(DEFAULTS)}")
    arguments = {name: type(default)(given.get(name, default)) for name, default in DEFAULTS.items()}
    for name, (low, high) in LIMITS.items():
        if not low <= arguments[name] <= high:
            raise ValueError(f"{name} must be in {low}..{high}, got {arguments[name]}")
    return arguments


class Images(BaseHTTPRequestHandler):
    session: onnxruntime.InferenceSession
    one_at_a_time = threading.Lock()  # so that a request has all cores

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if address.path == "/health":
            self.answer(200, "text/plain", b"ok\n")
            return
        try:
            arguments = arguments_of(address.query)
            with self.one_at_a_time:
                images = sample(self.session, **arguments)
        except ValueError as error:
            self.answer(400, "text/plain", f"{error}\n".encode())
            return
        except Exception as error:  # onnxruntime refuses, for example, a label that the model does not have
            self.answer(400, "text/plain", f"the model refuses this request: {error}\n".encode())
            return
        row, picture = np.round(255 * np.concatenate(list(images), axis=1)).astype(np.uint8), io.BytesIO()
        Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row).save(picture, "PNG")
        self.answer(200, "image/png", picture.getvalue())

    def answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def onnx_file(model: str) -> str:
    if Path(model).is_dir():
        return str(Path(model, "onnx", "model.onnx"))
    from huggingface_hub import hf_hub_download

    return hf_hub_download(model, "onnx/model.onnx")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    Images.session = onnxruntime.InferenceSession(onnx_file(args.model))
    server = ThreadingHTTPServer((args.host, args.port), Images)
    print(f"http://{args.host}:{server.server_port}/", flush=True)
    server.serve_forever()
