"""A folder as a repository of the Hugging Face Hub, through huggingface_hub.

HF_ENDPOINT and HF_TOKEN, or what `hf auth login` keeps, say where and as whom.
"""

from __future__ import annotations

import re
from pathlib import Path


def require_login(repository: str) -> None:
    """Raise ValueError for a name that is none, without a token, and without huggingface_hub."""
    try:
        from huggingface_hub import get_token
    except ImportError as error:
        raise ValueError("--push-to-hub needs huggingface_hub; install vaetrain[hub]") from error
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"--push-to-hub is {repository}; give OWNER/NAME")
    if get_token() is None:
        raise ValueError("--push-to-hub needs a token: set HF_TOKEN, or log in once with `hf auth login`")


def push(folder: Path, repository: str, *, public: bool = False) -> str:
    """Upload a folder in one commit, to a new private repository unless there is one or `public`; returns its address.

    Raises ValueError when the server refuses or is not reached.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=not public, exist_ok=True)
        hub.upload_folder(folder_path=folder, repo_id=repository, commit_message="Export of vaetrain")
    except Exception as error:  # its HTTP client's, too, and which that is depends on its version
        raise ValueError(
            f"{folder} is exported but not pushed to {repository}: {error}. `hf upload {repository} {folder}` pushes it"
        ) from error
    return str(address)
