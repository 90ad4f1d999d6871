"""What the Hugging Face hub's failures mean to a user.

transformers, huggingface_hub and datasets wrap one another's exceptions, and what counts is somewhere down the chain
of causes. One function reads that chain and says which repository failed, why, and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from llama_ft.errors import UserError

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_NO_NETWORK = {
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "NetworkError",
    "ConnectionError",
    "ProxyError",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
}


def is_hub_id(name: str) -> bool:
    """Whether `name` has the shape of a hub repository: `name` or `owner/name`."""
    return bool(_HUB_ID.match(name)) and ".." not in name


def hub_reachable(timeout: float = 5.0) -> bool:
    """Whether the hub answers within `timeout` seconds; False when offline mode is on."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except OfflineModeIsEnabled:
        return False
    except Exception as error:  # every transport has its own exceptions; only "no answer" matters here
        return not (_names(error) & _NO_NETWORK or isinstance(error, OSError))
    return True


@contextmanager
def quick_hub() -> Iterator[None]:
    """Hub calls in this block fall back on the local cache at once when the hub does not answer.

    Without it, the hub's client retries a dead network for about 25 seconds per file before it says so.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not hub_reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_problem(
    error: BaseException, repo_id: str, *, what: str = "model", key: str | None = None, instead: str | None = None
) -> UserError:
    """Translates an exception of huggingface_hub, transformers, datasets or httpx into one :class:`UserError`.

    `what` is the kind of repository in words (`model`, `tokenizer`, `data set`); `key` the recipe's key that named it;
    `instead` what a user can do without the hub (by default: name a local folder).
    The result is to be raised `from error`, which `--debug` shows; the chain says nothing more to a user.
    """
    said, hint = _explain(error, repo_id, what)
    other = instead or f"or name a local folder in place of '{repo_id}'"
    return UserError(said, key=key, hint=f"{hint}, {other}")


def _explain(error: BaseException, repo_id: str, what: str) -> tuple[str, str]:
    """What happened and what to do; the first matching sign along the chain of causes decides."""
    names = _names(error)
    text = " ".join(str(link) for link in _chain(error))
    status = next((code for link in _chain(error) if (code := _status(link))), None)
    login = "" if _has_token() else "no token was found: "
    offline = _offline()
    dead = bool(names & _NO_NETWORK) or "couldn't connect" in text.lower()
    away = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    back = "unset HF_HUB_OFFLINE" if offline else "connect to the network"
    cases = [
        (
            "GatedRepoError" in names or "access a gated repo" in text,
            f"the {what} '{repo_id}' is gated: its owner asks you to accept a licence first",
            f"{login}accept it on its hub page, then run `hf auth login` with that account",
        ),
        (
            "RevisionNotFoundError" in names,
            f"the {what} '{repo_id}' has no such revision on the hub",
            "check the branch, tag or commit",
        ),
        (
            "RemoteEntryNotFoundError" in names or "does not appear to have a file" in text,
            f"the hub's '{repo_id}' lacks a file that a {what} needs: {_first_line(error)}",
            "check the id",
        ),
        (
            bool(names & {"RepositoryNotFoundError", "DatasetNotFoundError"}) or status in (401, 404),
            f"the hub has no {what} '{repo_id}', or it is private",
            f"check the spelling (owner/name); for a private one, {login}run `hf auth login`",
        ),
        (
            "HFValidationError" in names or "Repo id must be" in text,
            f"'{repo_id}' is neither a folder nor a hub id (owner/name)",
            "check the path",
        ),
        (
            dead,
            f"the {what} '{repo_id}' is not on this machine and {away}",
            f"{back} (a gated one also needs its licence accepted and `hf auth login`)",
        ),
        (
            status is not None and (status == 429 or status >= 500),
            f"the hub answered {status} for the {what} '{repo_id}'",
            "try again later",
        ),
    ]
    for holds, said, hint in cases:
        if holds:
            return said, hint
    return f"the {what} '{repo_id}' could not be loaded: {_first_line(error)}", "check the id"


def _chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links


def _names(error: BaseException) -> set[str]:
    """Class names along the chain, without the built-in bases (a plain OSError says nothing)."""
    return {
        base.__name__
        for link in _chain(error)
        for base in type(link).__mro__
        if base.__name__ not in ("OSError", "Exception", "BaseException", "object", "ValueError")
    }


def _status(error: BaseException) -> int | None:
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def _has_token() -> bool:
    from huggingface_hub import get_token

    return bool(get_token())


def _offline() -> bool:
    """Whether the user switched the hub off (`quick_hub` is over by the time a failure is explained)."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
