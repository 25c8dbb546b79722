"""fetch against a stub of the Hub on loopback: what is downloaded, what is not, and every way it can fail."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from tiny import GOLDENS

from converters.checkpoint import open_checkpoint
from converters.hub import fetch

COMMIT = "a" * 40
SAFE, BIN = "acme/safe", "acme/bin"


class Hub(ThreadingHTTPServer):
    """Repositories from folders; `asked` lists (method, path) and `tokens` the Authorization headers seen."""

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.asked, self.tokens = repositories, [], set()

    @property
    def downloaded(self):
        return {path.rpartition("/")[2] for method, path in self.asked if method == "GET" and "/resolve/" in path}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub  # type: ignore[assignment]

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0].strip("/")
        owner, model, *rest = path.removeprefix("api/models/").split("/", 2)
        name, rest = f"{owner}/{model}", "".join(rest)
        if name == "acme/gated":
            return self._answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if (files := self.server.repositories.get(name)) is None:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repo"})
        if rest.startswith("revision/") and rest not in ("revision/main", f"revision/{COMMIT}"):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"})
        if path.startswith("api/") and rest.startswith("tree/"):
            tree = [{"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for f, b in files.items()]
            return self._answer(200, json.dumps(tree).encode(), {})
        if path.startswith("api/"):
            info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files], "tags": [], "private": False}
            return self._answer(200, json.dumps(info).encode(), {})
        body = files[rest.split("/", 2)[2]]
        self._answer(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _answer(self, status, body, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format, *args):
        pass


def repository(case, **more):
    files = {path.name: path.read_bytes() for path in (GOLDENS / case).iterdir() if path.suffix != ".npy"}
    return files | {name.replace("__", "/").replace("_DOT_", "."): body for name, body in more.items()}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    safe = repository("llama_sharded", tokenizer_DOT_json=b"{}", original__weights_DOT_safetensors=b"x", README_DOT_md=b"x")
    safe |= {"pytorch_model.bin": b"not wanted", "consolidated.safetensors": b"x"}
    server = Hub({SAFE: safe, BIN: repository("llama_bin")})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert fetch(str(tmp_path)) == tmp_path


def test_downloads_safetensors_and_configs_and_nothing_else(hub, tmp_path):
    folder = fetch(SAFE, download_dir=tmp_path)
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert hub.downloaded == shards | {"model.safetensors.index.json", "config.json", "tokenizer.json"}
    assert hub.tokens == {"Bearer hf_secret"}
    assert open_checkpoint(folder).config.num_heads == 4


def test_downloads_bin_where_there_is_no_safetensors_or_when_asked(hub, tmp_path):
    assert (fetch(BIN, download_dir=tmp_path) / "pytorch_model.bin").exists()
    fetch(SAFE, download_dir=tmp_path, load_format="pt")
    assert "pytorch_model.bin" in hub.downloaded and not any(name.endswith("safetensors") for name in hub.downloaded)


def test_without_weights_only_small_files_come(hub, tmp_path):
    folder = fetch(SAFE, download_dir=tmp_path, weights=False)
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors.index.json"}


def test_the_cache_serves_without_a_network(hub, tmp_path, monkeypatch):
    online = fetch(SAFE, download_dir=tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch(SAFE, download_dir=tmp_path) == online
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(SAFE, download_dir=tmp_path) == online


def test_no_network_and_no_cache_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"acme/safe is not in the cache .*, and http://127.0.0.1:9 cannot be reached"):
        fetch(SAFE, download_dir=tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"HF_HUB_OFFLINE is set"):
        fetch(SAFE, download_dir=tmp_path)


def test_gated_missing_and_misspelt_are_told_apart(hub, tmp_path):
    with pytest.raises(PermissionError, match=r"acme/gated is gated: accept its terms at http.*/acme/gated, then set HF_TOKEN"):
        fetch("acme/gated", download_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model acme/none at http.*HF_TOKEN does not open it"):
        fetch("acme/none", download_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"acme/safe at http.* has no revision 'v9'"):
        fetch(SAFE, revision="v9", download_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder \./nowhere"):
        fetch("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither a folder here nor a Hub id"):
        fetch("not a name")
