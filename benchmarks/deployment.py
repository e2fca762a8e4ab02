"""The ways to run a model of docs/deployment.md, timed: `python -m benchmarks.deployment [--model model_cards/mnist] [--browser]`

Each way makes the same number of images by DDIM with the same number of steps. First checks that the images of the pipelines
agree, but for those of 8 bits. The service is examples/serve_onnx.py, asked on loopback. `--browser` adds the page of
ddpm_hf/demo in a headless Chromium, one image at a time, which needs npm, chromium and playwright.
"""

import functools
import http.client
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from transformers.hf_argparser import HfArg, HfArgumentParser

from benchmarks.harness import describe_machine, interleaved_medians, print_ratios
from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.demo.site import add_runtime, write_site
from ddpm_hf.export.onnx_files import export_onnx
from ddpm_hf.pipelines.guidance import cycled_labels
from ddpm_hf.schedulers.samplers import make_sampler

SERVICE = Path(__file__).resolve().parent.parent / "examples" / "serve_onnx.py"
SAMPLE = """async (steps) => {
  const chain = ddpm.makeChain(ddpm.facts.alphas_cumprod, ddpm.spacedTimesteps(ddpm.facts.alphas_cumprod.length, steps));
  const stream = ddpm.gaussian(0);
  for await (const step of ddpm.denoise(ddpm.facts, chain, {sampler: "ddim"}, stream(ddpm.size), [stream], ddpm.predict));
}"""


@dataclass
class DeploymentArguments:
    model: str = HfArg(default="model_cards/mnist", help="folder of a model")
    batch_sizes: list[int] = HfArg(default_factory=lambda: [1, 16], help="images of a call")
    steps: int = HfArg(default=20, help="steps of DDIM")
    rounds: int = HfArg(default=7, help="number of timed calls of each candidate")
    browser: bool = HfArg(default=False, help="time the page in Chromium too")


@contextmanager
def service(folder: str) -> Iterator[Callable[[int, int], bytes]]:
    """A function that asks the service for a picture of so many images by so many steps."""
    command = [sys.executable, str(SERVICE), folder, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            host = process.stdout.readline().strip().removeprefix("http://").rstrip("/")

            def ask(number: int, steps: int) -> bytes:
                connection = http.client.HTTPConnection(host, timeout=60)
                connection.request("GET", f"/?number={number}&steps={steps}")
                answer = connection.getresponse()
                if answer.status != 200:
                    raise SystemExit(f"the service answers {answer.status}: {answer.read().decode()}")
                return answer.read()

            yield ask
        finally:
            process.kill()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def page(model: str, folder: str) -> Iterator[Callable[[int], None]]:
    """A function that makes an image by so many steps in a browser."""
    from playwright.sync_api import sync_playwright

    write_site(model, folder)
    if not add_runtime(folder):
        raise SystemExit("the page needs onnxruntime-web from npm")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(f"http://127.0.0.1:{server.server_port}/")
        tab.wait_for_function("globalThis.ddpm?.predict !== undefined")
        yield lambda steps: tab.evaluate(SAMPLE, steps)
        browser.close()
    server.shutdown()


def pipelines(model: str, folder: str) -> dict[str, DDPMPipelineCustom]:
    ours = DDPMPipelineCustom.from_pretrained(model)
    export_onnx(ours, folder, ["int8"])
    found = {"ddpm_hf": ours, "ddpm_hf, compiled": DDPMPipelineCustom.from_pretrained(model)}
    found["ddpm_hf, compiled"].compile()
    for name, variant in {"ONNX Runtime": None, "ONNX Runtime, int8": "int8"}.items():
        found[name] = DDPMPipelineCustom.from_pretrained(folder, backend="onnxruntime", variant=variant)
    for pipe in found.values():
        pipe.scheduler = make_sampler("ddim", pipe.scheduler)
        pipe.set_progress_bar_config(disable=True)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(DeploymentArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    print(f"{describe_machine()}; {args.steps} steps")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        pipes = pipelines(args.model, folder)
        shutil.copy(Path(args.model, "model_index.json"), folder)
        ask = stack.enter_context(service(folder))
        draw = stack.enter_context(page(args.model, f"{folder}/site")) if args.browser else None

        def images(name: str, size: int) -> np.ndarray:
            condition = {"class_labels": labels} if (labels := cycled_labels(pipes[name].unet, range(size))) else {}
            return pipes[name](size, None, args.steps, "np", seed=0, **condition).images

        for size in args.batch_sizes:
            expected = images("ddpm_hf", size)
            for name in ("ddpm_hf, compiled", "ONNX Runtime"):
                if not np.abs(images(name, size) - expected).max() < 1e-3:
                    raise SystemExit(f"the images of {name} are other ones, so timing them is pointless")
            candidates = {name: functools.partial(images, name, size) for name in pipes}
            candidates["HTTP service"] = functools.partial(ask, size, args.steps)
            if draw is not None and size == 1:
                candidates["page in a browser"] = functools.partial(draw, args.steps)
            print_ratios(f"{size} images", interleaved_medians(candidates, args.rounds), "ddpm_hf")


if __name__ == "__main__":
    main(sys.argv[1:])
