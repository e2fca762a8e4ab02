"""Tests of `ddpm_hf.hub`, and the Hub that they and tests/training/test_uploads.py use.

- server.py: a Hub-compatible HTTP server on loopback (standard library only), with faults on request.
- store.py: its repositories, commits and users, in memory.
- xet.py: its Xet storage (chunks, xorbs, shards).
- client.py: a script that uses the real client in a process of its own, which `run_client` starts.
- test_server.py tests the server itself; test_publish.py and test_model_card.py test `ddpm_hf.hub`; test_faults.py tests
  uploads and downloads with every network fault (`ddpm_hf.transfer.downloads`), test_wrong_answers.py with a Hub that does not answer,
  or answers with something else.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.hub.server import Fault, HubServer
from tests.hub.store import Repo

__all__ = ["Fault", "HubServer", "Repo", "hub_environment", "run_client"]

ROOT = Path(__file__).resolve().parents[2]


def hub_environment(hub: HubServer, home: Path, **changes: str) -> dict[str, str]:
    """Environment variables of a process whose Hub is `hub` and whose cache is `home`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return env | {"HF_XET_CLIENT_RETRY_BASE_DELAY": "100ms", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "3"} | changes


def run_client(env: dict[str, str], *arguments: str, requests: list[dict] | None = None):
    """Run client.py. Returns the results that it prints for `requests`. Neither stdout nor stderr may hold a token."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("client.py")), *arguments],
        input=json.dumps(requests),
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    tokens = {env.get("HF_TOKEN"), *(request.get("token") for request in requests or [])} - {None, ""}
    assert not any(token in done.stdout + done.stderr for token in tokens)
    return json.loads(done.stdout.splitlines()[-1]) if requests is not None else None
