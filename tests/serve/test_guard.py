"""Nobody but a page of ours, on this machine, is answered; and no page loads anything from elsewhere."""

import json

import pytest
from starlette.testclient import TestClient

from flexmemory.serve.editing import MAX_PATCH_BYTES
from flexmemory.serve.explorer import hosts_of
from flexmemory.serve.guard import host_name


def test_every_response_forbids_other_sources(explored):
    for path in ("/", "/style.css", "/api/meta.json", "/api/token/99999", "/nothing"):
        headers = explored.client.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def test_failures_of_ours_are_answered_too(explored, monkeypatch):
    def fail(*_args):
        raise RuntimeError("secret")

    monkeypatch.setattr(explored.records, "token", fail)
    client = TestClient(explored.client.app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    response = client.get("/api/token/1")
    assert response.status_code == 500
    assert "RuntimeError" in response.json()["error"]
    assert "secret" not in response.text
    assert "content-security-policy" in response.headers


@pytest.mark.parametrize("address", ["0.0.0.0", "::", ""])
def test_an_address_that_stands_for_many_is_refused(address):
    with pytest.raises(ValueError, match="no single address"):
        hosts_of(address)
    assert "192.168.1.7" in hosts_of("192.168.1.7")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8642", "127.0.0.1.evil.example", "", "[::2]:8642"])
def test_unknown_hosts_are_refused(explored, host):
    response = explored.client.get("/api/meta.json", headers={"host": host})
    assert response.status_code == 403
    assert "content-security-policy" in response.headers


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:8642", "[::1]:8642"])
def test_loopback_is_served(explored, host):
    assert explored.client.get("/api/meta.json", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:8642", "http://127.0.0.1:1"])
def test_other_origins_change_and_read_nothing(explored, origin):
    for send in (explored.client.post, lambda path, **_: explored.client.get("/api/state", headers={"origin": origin})):
        response = send("/api/edit/revert", json={}, headers={"origin": origin})
        assert response.status_code == 403, response.text


def test_our_own_origin_is_served(explored):
    headers = {"origin": "http://127.0.0.1:8642", "sec-fetch-site": "same-origin"}
    assert explored.client.post("/api/prompt", json={"text": "a"}, headers=headers).status_code == 200


def test_pages_of_other_sites_may_lead_here_and_no_more(explored):
    foreign = {"sec-fetch-site": "cross-site"}
    assert explored.client.get("/", headers={**foreign, "sec-fetch-mode": "navigate"}).status_code == 200
    assert explored.client.get("/api/meta.json", headers={**foreign, "sec-fetch-mode": "no-cors"}).status_code == 403
    post = explored.client.post("/api/prompt", json={"text": "a"}, headers={**foreign, "sec-fetch-mode": "navigate"})
    assert post.status_code == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_bodies_that_a_form_could_send_are_refused(explored, kind):
    response = explored.client.post("/api/prompt", content=b"{}", headers={"content-type": kind})
    assert response.status_code == 415


@pytest.mark.parametrize("chunked", [True, False])
def test_large_bodies_are_refused_before_they_are_read(explored, chunked):
    most = explored.client.app.max_body_bytes
    body = json.dumps({"text": "a" * most}).encode()
    content = (body[i : i + 2**20] for i in range(0, len(body), 2**20)) if chunked else body
    response = explored.client.post("/api/prompt", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert most > MAX_PATCH_BYTES
    assert str(most) in response.json()["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"text": NaN}', b'{"text": "\\ud800"}'])
def test_bodies_that_are_no_fields_are_refused(explored, body):
    response = explored.client.post("/api/prompt", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]


def test_verbs_are_posted_and_other_methods_unknown(explored):
    assert explored.client.get("/api/edit/apply").status_code == 404
    assert explored.client.post("/api/token/1", json={}).status_code == 405
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH"):
        assert explored.client.request(method, "/api/prompt").status_code == 405


@pytest.mark.parametrize("path", ["/../guard.py", "/%2e%2e/guard.py", "/static/../../guard.py", "/..%2fguard.py"])
def test_nothing_outside_the_page_is_served(explored, path):
    assert explored.client.get(path).status_code == 404


@pytest.mark.parametrize(("host", "name"), [("[::1]:80", "::1"), ("A:1", "a"), ("localhost", "localhost"), ("", "")])
def test_names_of_hosts(host, name):
    assert host_name(host) == name
