"""Who may use a server, and what it says to others."""

import httpx2 as httpx
import pytest

BODY = {"prompt": "a", "max_tokens": 1}


def test_a_key_is_asked_for(serving) -> None:
    address = serving(api_keys=("first-key", "second-key"))
    path = f"{address}/v1/completions"
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic first-key"}):
        response = httpx.post(path, json=BODY, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert "first-key" not in response.text
    for headers in (
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer second-key"},
        {"x-api-key": "second-key"},
    ):
        assert httpx.post(path, json=BODY, headers=headers).status_code == 200
    assert httpx.get(f"{address}/health").status_code == 200
    assert httpx.get(f"{address}/v1/models").status_code == 401
    strange = {"authorization": "Bearer ké".encode("latin-1")}
    assert httpx.get(f"{address}/v1/models", headers=strange).status_code == 401


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_a_key_of_any_letters(serving, header: str) -> None:
    """As UTF-8, or as Latin-1 where it can be; the last byte of à is a space in Latin-1."""
    url = f"{serving(api_keys=('schlüssel', 'voilà', 'ключ'))}/v1/models"
    scheme = b"Bearer " if header == "authorization" else b""

    def status(key: bytes) -> int:
        return httpx.get(url, headers={header: scheme + key}).status_code

    for key in ("schlüssel", "voilà", "ключ"):
        assert status(key.encode()) == 200, key
    assert status("schlüssel".encode("latin-1")) == 200
    for wrong in ("schlüsse", "schlussel", "voil", "voilÃ", "ключ ключ"):
        assert status(wrong.encode()) == 401, wrong
    assert status("ключ".encode("koi8-r")) == 401


def test_a_body_beyond_the_limit(serving) -> None:
    address = serving(body_limit=1000)
    path = f"{address}/v1/completions"
    long = b'{"prompt": "' + b"a" * 1000 + b'"}'
    for content in (long, iter([long[:600], long[600:]])):  # with a length, and without
        response = httpx.post(path, content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
    assert httpx.post(path, json=BODY).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_pages_of_other_sites_are_refused(address: str, origin: str) -> None:
    response = httpx.post(f"{address}/v1/completions", json=BODY, headers={"origin": origin})
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers
    own = httpx.post(f"{address}/v1/completions", json=BODY, headers={"origin": address})
    assert own.status_code == 200


def test_other_names_for_this_machine(serving) -> None:
    """A site's name that leads to 127.0.0.1 makes its pages ours; without a key, it may not."""
    address = serving(any_host=False)
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::2]:1"):
        assert httpx.get(f"{address}/health", headers={"host": host}).status_code == 403
    for host in ("localhost", "localhost:1", "127.0.0.1", "[::1]:80", "[::1]"):
        assert httpx.get(f"{address}/health", headers={"host": host}).status_code == 200


def test_what_is_not_served(address: str) -> None:
    for response, status in (
        (httpx.get(f"{address}/v2/nothing"), 404),
        (httpx.get(f"{address}/v1/completions"), 405),
        (httpx.get(f"{address}/v1/models/other"), 404),
        (httpx.get(f"{address}/v1/models/a/b"), 404),
        (httpx.post(f"{address}/v1/completions", json={**BODY, "model": "other"}), 404),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_the_model_is_listed_without_its_place(address: str, folder) -> None:
    listed = httpx.get(f"{address}/v1/models")
    assert [each["id"] for each in listed.json()["data"]] == ["tiny"]
    assert listed.json()["data"][0]["max_model_len"] == 512
    assert str(folder.parent) not in listed.text
    assert httpx.get(f"{address}/v1/models/tiny").json() == listed.json()["data"][0]
