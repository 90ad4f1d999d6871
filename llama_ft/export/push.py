"""A finished export on the hub: the merged model, its card, its proof; GGUF files and the adapter beside it."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from llama_ft.errors import MachineFault, UserError
from llama_ft.recipe.run import Run

PICTURE = re.compile(r"!\[[^\]]*\]\((?P<file>[^)]+)\)")


def files_of(run: Run) -> dict[str, Path]:
    """What goes to the hub, by its place there. UserError for a run without a merged model whose proof passed.

    The merged model lies at the top, where transformers and vLLM look for it; the recipe goes with it, and checkpoints,
    logs and metrics stay.
    """
    if not (run.merged / "config.json").is_file():
        raise UserError(f"{run.path} has no merged/ to push", hint=f"llama-ft export {run.path}")
    found = {file.name: file for file in sorted(run.merged.iterdir()) if file.is_file()}
    for file in (run.card_file, run.proof_file, run.recipe_file):
        if file.is_file():
            found[file.name] = file
    if run.card_file.is_file():
        for picture in PICTURE.finditer(run.card_file.read_text(encoding="utf-8")):
            if (run.path / picture["file"]).is_file():
                found[picture["file"]] = run.path / picture["file"]
    for folder in (run.adapter, run.path / "gguf"):  # nf4/ has names that merged/ has too
        if folder.is_dir():
            found |= {f"{folder.name}/{file.name}": file for file in sorted(folder.iterdir()) if file.is_file()}
    return found


def check_place(place: str) -> None:
    """UserError for a name the hub would not take, or where nobody is logged in: before anything is merged."""
    try:
        validate_repo_id(place)
    except HFValidationError as error:
        raise UserError(f"'{place}' is no name of a repository: {error}", hint="--push OWNER/NAME") from error
    if place.count("/") != 1:
        raise UserError(f"'{place}' names no owner", hint="--push OWNER/NAME")
    if get_token() is None:
        raise UserError("nobody is logged in to the hub", hint="hf auth login, or set HF_TOKEN")


def push_run(run: Run, place: str, *, private: bool = True) -> str:
    """Creates the repository where there is none and uploads a run's export in one commit. Returns its address.

    private: of a repository that is new. Raises UserError as :func:`files_of` and :func:`check_place` do, and where the
    hub refuses; MachineFault where it cannot be reached. A large file that went up is not sent again.
    """
    check_place(place)
    files = files_of(run)
    hub = HfApi()
    try:
        hub.create_repo(place, private=private, exist_ok=True)
        changes = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        hub.create_commit(place, changes, commit_message=f"{run.recipe.name}, by llama_ft")
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        said = error.server_message or str(error).strip().splitlines()[0]
        if status is not None and status < 500:
            raise UserError(
                f"the hub refused {place}: {said}", hint="is it yours, and may your token write?"
            ) from error
        raise MachineFault(
            f"the hub did not take {place}: {said}", hint="try again; what went up stays there"
        ) from error
    except OSError as error:  # no network, or HF_HUB_OFFLINE
        hint = "HF_HUB_OFFLINE is set, or there is no network; the export itself is done"
        raise MachineFault(f"the hub cannot be reached: {error}", hint=hint) from error
    return f"{hub.endpoint}/{place}"
