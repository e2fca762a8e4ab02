"""A user of the Hub, as a script in a process of its own: the client reads HF_ENDPOINT when it is imported.

- `client.py calls` reads a JSON list of {"call", ...arguments} from stdin, makes the calls concurrently and prints the
  results: uploads and downloads of files, without models, for tests of network faults.
- `client.py load OUT STEP...` runs steps of `LOAD`, several in a process because imports are slow. Each writes
  OUT/<step>.npy (images) or OUT/<step>.txt (its error).
- `client.py scripts` reads a JSON list of {"script", "arguments", "env"} from stdin, runs each script as from the command
  line and prints the results.
"""

import contextlib
import io
import json
import logging
import os
import runpy
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

BATCH, STEPS, SEED = 2, 20, 0
CONCURRENT_CALLS = 64  # most of them wait
# The documented errors.
SENTENCES = (ValueError, OSError, PermissionError, FileNotFoundError, ConnectionError, TimeoutError)


def sample(pipe) -> np.ndarray:
    """Images for comparing pipelines, this package's or diffusers'."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    return pipe(batch_size=BATCH, generator=generator, num_inference_steps=STEPS, output_type="np").images


def own(repo_id: str, **kwargs) -> np.ndarray:
    from ddpm_hf import DDPMPipelineCustom

    return sample(DDPMPipelineCustom.from_pretrained(repo_id, **kwargs))


def stock(repo_id: str) -> np.ndarray:
    """Images by diffusers alone: this package cannot be imported, and the cache is a separate one."""
    if "ddpm_hf" in sys.modules:
        raise RuntimeError("this step must run before steps that import ddpm_hf")
    sys.modules["ddpm_hf"] = None
    try:
        from diffusers import DDPMPipeline

        return sample(DDPMPipeline.from_pretrained(repo_id, cache_dir=os.environ["HF_HOME"] + "/stock"))
    finally:
        del sys.modules["ddpm_hf"]


def without_network(repo_id: str) -> np.ndarray:
    """Nothing listens at the Hub's address, as on a machine without a network."""
    from huggingface_hub import constants

    endpoint, constants.ENDPOINT = constants.ENDPOINT, "http://127.0.0.1:9"
    try:
        return own(repo_id)
    finally:
        constants.ENDPOINT = endpoint


def push(repo_id: str, new_id: str) -> np.ndarray:
    from ddpm_hf import DDPMPipelineCustom

    pipe = DDPMPipelineCustom.from_pretrained(repo_id)
    pipe.push_to_hub(new_id)
    return sample(pipe)


LOAD = {
    "stock": lambda: stock("user/name"),
    "own": lambda: own("user/name"),
    "trained": lambda: own("user/stopped"),
    "trained, stock": lambda: stock("user/stopped"),
    "trained, step 2": lambda: own("user/stopped", revision="step-2"),
    "tag": lambda: own("user/name", revision="v1"),
    "commit": lambda: own("user/name", revision=os.environ["FIRST_COMMIT"]),
    "no revision": lambda: own("user/name", revision="v2"),
    "flat": lambda: own("google/ddpm-flat"),
    "pickle": lambda: own("google/ddpm-pickle"),
    "code": lambda: own("other/code"),
    "safetensors only": lambda: own("google/ddpm-pickle", use_safetensors=True),
    "no pipeline": lambda: own("other/text"),
    "private": lambda: own("user/private"),
    "private, no token": lambda: own("user/private", token=False, cache_dir=os.environ["HF_HOME"] + "/anonymous"),
    "missing": lambda: own("user/nothing"),
    "gated": lambda: own("other/gated"),
    "bad token": lambda: own("other/uncached", token="hf_" + "0" * 34),
    "no network": lambda: without_network("other/uncached"),
    "push": lambda: push("user/name", "user/name2"),
    "pushed": lambda: own("user/name2"),
}


def load(out: Path, *steps: str) -> None:
    for step in steps:
        try:
            np.save(out / f"{step}.npy", LOAD[step]())
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", []))
            (out / f"{step}.txt").write_text(f"{type(error).__name__}: {error}\n{notes}")


def scripts() -> None:
    results = []
    for case in json.load(sys.stdin):
        saved, output = dict(os.environ), io.StringIO()
        os.environ.update(case["env"])
        sys.argv = [case["script"], *case["arguments"]]
        logging.getLogger().handlers.clear()  # they write to the output of the previous script
        status = 0
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                runpy.run_path(case["script"], run_name="__main__")
            except SystemExit as end:  # as the interpreter: a text is printed, and the status is 1
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code)
            except Exception:
                status = 1
                traceback.print_exc()
        os.environ.clear()
        os.environ.update(saved)
        results.append({"status": status, "output": output.getvalue()})
    print(json.dumps(results))


def calls() -> None:
    from ddpm_hf.transfer.downloads import Retries, download_snapshot

    requests = json.load(sys.stdin)
    if any(request["call"] == "publish" for request in requests):  # imports torch and diffusers, which takes seconds
        from ddpm_hf.hub.publish import publish
    retries = Retries(int(os.environ.get("TRIES", 5)), first_wait_seconds=0.05)

    def make(request: dict) -> dict:
        arguments = dict(request)
        name, repo_id = arguments.pop("call"), arguments.pop("repo_id")
        try:
            if name == "publish":
                done = publish(arguments.pop("folder"), repo_id, retries=retries, **arguments)
                return {"commit": done.commit, "url": done.url}
            folder = download_snapshot(repo_id, retries=retries, **arguments)
            return {"folder": str(folder)}
        except Exception as error:
            cause = error.__cause__ or error
            found = {"trace": "".join(traceback.format_exception(cause))} if type(error) not in SENTENCES else {}
            return {"error": f"{type(error).__name__}: {error}", **found}

    with ThreadPoolExecutor(CONCURRENT_CALLS) as pool:
        print(json.dumps(list(pool.map(make, requests))))


if __name__ == "__main__":
    if sys.argv[1] == "load":
        load(Path(sys.argv[2]), *sys.argv[3:])
    elif sys.argv[1] == "calls":
        calls()
    else:
        scripts()
