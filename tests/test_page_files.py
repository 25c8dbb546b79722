"""The chat page's files, by HTTP: types, headers, keys, the switch, and that all of them are in the package."""

import re
import tomllib
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from server_fixtures import serving

from serving.options import ServerOptions
from serving.routes import page as page_route

ROOT = Path(__file__).parent.parent
FILES = sorted(path for path in page_route.FOLDER.iterdir())


@pytest.fixture(scope="module")
def plain():
    with serving(FakeEngine(), ServerOptions(api_key=("secret",))) as served:
        yield served


def test_every_file_is_served_without_a_key_and_with_its_type(plain):
    kinds = {
        "html": "text/html; charset=utf-8",
        "css": "text/css; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "svg": "image/svg+xml",
    }
    for path in FILES:
        address = "/" if path.name == "index.html" else f"/page/{path.name}"
        response = plain.http.get(address)
        assert response.status_code == 200 and response.content == path.read_bytes(), path
        assert response.headers["content-type"] == kinds[path.suffix[1:]]
        assert response.headers["x-content-type-options"] == "nosniff" and response.headers["cache-control"] == "no-cache"
        bare = plain.http.head(address)
        assert bare.status_code == 200 and not bare.content and bare.headers["content-length"] == str(path.stat().st_size)


def test_a_file_that_is_known_is_not_sent_again(plain):
    first = plain.http.get("/page/app.js")
    for tag in (first.headers["etag"], f'"other", W/{first.headers["etag"]}'):
        again = plain.http.get("/page/app.js", headers={"if-none-match": tag})
        assert again.status_code == 304 and not again.content and again.headers["etag"] == first.headers["etag"]
    assert plain.http.get("/page/app.js", headers={"if-none-match": '"other"'}).status_code == 200


def test_the_policy_lets_nothing_in_from_elsewhere(plain):
    said = plain.http.get("/").headers["content-security-policy"]
    policy = {name: set(sources) for name, *sources in (part.split() for part in said.split(";"))}
    assert policy["default-src"] == {"'none'"} and policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == {"'none'"}
    assert set().union(*policy.values()) <= {"'none'", "'self'", "'script'"}, "no host, no inline, no eval"
    assert policy["require-trusted-types-for"] == {"'script'"} and policy["trusted-types"] == {"'none'"}


def test_only_the_files_are_open(plain):
    for address in ("/page/facts", "/page/none.js", "/page/..%2fapp.py", "/page/", "/page/index.html/", "/v1/models", "/metrics"):
        assert plain.http.get(address).status_code == 401, address
    key = {"authorization": "Bearer secret"}
    for address in ("/page/none.js", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page/"):
        assert plain.http.get(address, headers=key).status_code == 404, address
    assert plain.http.post("/", headers=key).status_code == 405


def test_what_the_page_asks_about_the_model():
    engine = FakeEngine()
    engine.default_params = {"temperature": 0.6, "max_tokens": 99}
    with serving(engine) as served:
        facts = served.http.get("/page/facts").json()
        assert facts["model"] == "fake" and facts["max_model_len"] == 256 and facts["chat_refused"] is None
        assert facts["defaults"] == {
            **{"temperature": 0.6, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 99, "seed": None},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0},
        }
        engine.tokenizer = None
        assert "without a tokenizer" in served.http.get("/page/facts").json()["chat_refused"]
        engine.default_params = {}
        assert served.http.get("/page/facts").json()["defaults"]["max_tokens"] is None, "as many as fit"


def test_it_can_be_switched_off():
    with serving(FakeEngine(), ServerOptions(disable_page=True)) as served:
        assert [served.http.get(address).status_code for address in ("/", "/page/app.js", "/page/facts")] == [404] * 3
        assert served.http.get("/v1/models").status_code == 200
    with serving(FakeEngine(), ServerOptions(disable_page=True, api_key=("secret",))) as served:
        assert served.http.get("/").status_code == 401


def test_all_of_it_is_in_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["serving"]
    packed = {path.name for pattern in data for path in (ROOT / "serving").glob(pattern)}
    assert packed == {path.name for path in FILES} == set(page_route.NAMES)
    assert sum(path.stat().st_size for path in FILES) < 120_000, "a page that loads at once"


def test_nothing_is_inline_and_nothing_is_missing():
    html = (page_route.FOLDER / "index.html").read_text()
    assert not re.findall(r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*\ssrc=)", html)
    wanted = set(re.findall(r'(?:src|href)="page/([^"]+)"', html))
    for script in page_route.FOLDER.glob("*.js"):
        wanted |= set(re.findall(r'from "\./([^"]+)"', script.read_text()))
        assert not re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|https?://(?!www\.w3\.org)\w", script.read_text()
        )
    assert wanted == {path.name for path in FILES} - {"index.html"}
