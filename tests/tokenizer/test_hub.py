"""The hub's failures, made by the real client against a server that answers as the hub does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from llama_ft.tokenizer.hub import hub_problem, is_hub_id

ANSWERS = {
    "gated": (403, "GatedRepo"),
    "missing": (401, "RepoNotFound"),
    "revision": (404, "RevisionNotFound"),
}

SCRIPT = """
import sys
from llama_ft.errors import UserError
from llama_ft.data.sources import open_sources
from llama_ft.recipe.schema import Data
from llama_ft.tokenizer.load import load_tokenizer
for name in sys.argv[1:]:
    try:
        open_sources([Data(use=name)]) if name.endswith(".yaml") else load_tokenizer(name)
    except UserError as error:
        assert len(error.problems) == 1
        print(error.problems[0])
"""


class Hub(BaseHTTPRequestHandler):
    """Answers by the repository's name, with the hub's own error header."""

    def do_HEAD(self) -> None:
        kind = next((name for name in ANSWERS if f"/{name}" in self.path), None)
        status, code = ANSWERS[kind] if kind else (200, None)
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def ask(endpoint: str, home: Path, *names: str) -> list[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    env.pop("HF_TOKEN", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_gated_missing_and_wrong_revision(hub: str, tmp_path: Path) -> None:
    card = tmp_path / "card.yaml"
    card.write_text("name: c\ntitle: c\nlayout: alpaca\nsource: {hub: owner/missing-rows}\n")
    gated, missing, revision, rows = ask(
        hub, tmp_path, "owner/gated-model", "owner/missing-model", "owner/revision-model", str(card)
    )
    assert gated.startswith("the tokenizer 'owner/gated-model' is gated: its owner asks you to accept a licence first")
    assert "no token was found" in gated and "hf auth login" in gated
    assert missing.startswith("the hub has no tokenizer 'owner/missing-model', or it is private")
    assert revision.startswith("the tokenizer 'owner/revision-model' has no such revision on the hub")
    assert rows.startswith("data.0.use: the hub has no data set 'owner/missing-rows', or it is private")
    assert rows.endswith("or fetch the rows yourself and add path: FILE beside use: c")


def test_dead_network_is_said_at_once(tmp_path: Path) -> None:
    """Port 9 refuses; the client alone would retry for 25 seconds and more."""
    (said,) = ask("http://127.0.0.1:9", tmp_path, "owner/model")
    assert said.startswith("the tokenizer 'owner/model' is not on this machine and the hub cannot be reached")
    assert "or name a local folder in place of 'owner/model'" in said


def test_busy_hub() -> None:
    request = httpx2.Request("GET", "http://hub/owner/model")
    error = HfHubHTTPError("busy", response=httpx2.Response(503, request=request))
    assert hub_problem(error, "owner/model").problems[0].what == "the hub answered 503 for the model 'owner/model'"


def test_anything_else_keeps_its_first_line() -> None:
    problem = hub_problem(RuntimeError("odd thing\nmore"), "owner/model", key="model.base").problems[0]
    assert problem.what == "the model 'owner/model' could not be loaded: odd thing"
    assert problem.key == "model.base"


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "Owner-1/na.me_2"])
def test_hub_ids(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "/a", "a/", "../a", "a/..", "-a"])
def test_not_hub_ids(name: str) -> None:
    assert not is_hub_id(name)
