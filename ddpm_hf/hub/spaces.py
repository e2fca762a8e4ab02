"""Put the files of a demo on the Hub as a Space, in one commit."""

from collections.abc import Mapping
from pathlib import Path

from ddpm_hf.checks import check_choice
from ddpm_hf.hub.commits import Published, ensure_repository, make_commit
from ddpm_hf.transfer.client import hub_api
from ddpm_hf.transfer.downloads import DEFAULT_RETRIES, Retries
from ddpm_hf.transfer.errors import explained


def publish_space(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    sdk: str,
    *,
    private: bool = False,
    commit_message: str = "Publish a demo made with ddpm_hf",
    token: str | None = None,
    retries: Retries = DEFAULT_RETRIES,
) -> Published:
    """Upload the files of a demo, by their names in the Space, which is created if it does not exist.

    Args:
        repo_id: "user/name".
        files: all files; README.md has the metadata of the Space. Other files that are in the Space stay.
        sdk: "static" or "gradio".

    Other arguments, retries and errors are those of `ddpm_hf.hub.publish.publish`.
    """
    check_choice("sdk", sdk, ("static", "gradio"))
    if "README.md" not in files:
        raise ValueError(f"files must hold README.md, the card of the Space, got {sorted(files)}.")
    repo_id = ensure_repository(repo_id, private, token, retries, repo_type="space", space_sdk=sdk)
    with explained(repo_id):
        api = hub_api(token)
        return make_commit(api, repo_id, lambda _: files, set(), commit_message, retries, repo_type="space")
