"""Pushing an export: what goes up, where, and what is said when it cannot. The hub is a server of this test's own."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llama_ft.errors import MachineFault, UserError
from llama_ft.export import push
from llama_ft.export.run import export_run


def test_what_goes_up(run):
    with pytest.raises(UserError, match="no merged/ to push"):
        push.files_of(run)
    export_run(run)
    (run.path / "loss.png").write_bytes(b"picture")
    run.card_file.write_text(run.card_file.read_text() + "\n![losses](loss.png)\n")
    (run.path / "gguf").mkdir()
    (run.path / "gguf" / "tiny-q8_0.gguf").touch()
    found = push.files_of(run)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "export.json", "recipe.yaml"} <= {*found}
    assert {"loss.png", "adapter/adapter_model.safetensors", "gguf/tiny-q8_0.gguf"} <= {*found}
    assert not any(name.startswith(("checkpoints", "metrics", "run.lock")) for name in found)
    assert found["README.md"] == run.card_file and all(file.is_file() for file in found.values())


@pytest.mark.parametrize(
    ("place", "token", "said"),
    [
        ("tiny", "hf_x", "names no owner"),
        ("me/a..b", "hf_x", "is no name of a repository"),
        ("me/tiny", None, "nobody is logged in"),
    ],
)
def test_a_place_is_judged_before_anything_is_done(monkeypatch, place, token, said):
    monkeypatch.setattr(push, "get_token", lambda: token)
    with pytest.raises(UserError, match=said):
        push.check_place(place)


@pytest.fixture
def hub(monkeypatch):
    """The hub's own protocol as far as a push speaks it: create, preupload, commit; what was asked of it is kept."""
    asked: list[tuple[str, str, bytes]] = []
    answers = {"status": 200}

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append((self.path, self.headers.get("Authorization", ""), body))
            if answers["status"] != 200:
                return self.answer(answers["status"], {"error": "You may not"})
            if self.path.endswith("/preupload/main"):
                files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
                return self.answer(200, {"files": [{**one, "shouldIgnore": False} for one in files]})
            found = {
                "url": "https://huggingface.co/me/tiny",
                "commitUrl": "https://huggingface.co/me/tiny/commit/1",
                "commitOid": "1",
            }
            return self.answer(200, found | {"name": "me/tiny", "id": "me/tiny", "success": True})

        def answer(self, status: int, value: dict) -> None:
            said = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    real = push.HfApi
    monkeypatch.setattr(push, "HfApi", lambda: real(endpoint=address, token="hf_secret"))
    monkeypatch.setattr(push, "get_token", lambda: "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield asked, answers
    server.shutdown()


def test_one_commit_with_all_of_it(run, hub):
    asked, _ = hub
    export_run(run)
    address = push.push_run(run, "me/tiny")
    assert address.endswith("/me/tiny")
    created = json.loads(asked[0][2])
    assert asked[0][0] == "/api/repos/create" and created["name"] == "tiny"
    assert created.get("visibility") == "private" or created.get("private") is True
    assert all(token == "Bearer hf_secret" for _, token, _ in asked)
    (commit,) = [body for path, _, body in asked if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {line["value"]["path"] for line in lines if line["key"] == "file"}
    assert sent == {*push.files_of(run)}


@pytest.mark.parametrize(
    ("status", "error", "said"), [(403, UserError, "refused me/tiny"), (500, MachineFault, "did not")]
)
def test_what_the_hub_says_is_passed_on(run, hub, status, error, said):
    _, answers = hub
    export_run(run)
    answers["status"] = status
    with pytest.raises(error, match=said):
        push.push_run(run, "me/tiny")


def test_without_a_network(run, monkeypatch):
    export_run(run)
    monkeypatch.setattr(push, "get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MachineFault, match="cannot be reached"):
        push.push_run(run, "me/tiny")
