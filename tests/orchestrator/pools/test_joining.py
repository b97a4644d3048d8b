"""A cluster that is joined is asked first whether it lets us in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.errors import InputError
from orchestrator.pools.connection import connect


class RefusedError(Exception):
    """What Ray raises at a wrong token."""


class NoAnswerError(Exception):
    """What Ray raises where something else answers."""


class FakeRay(SimpleNamespace):
    """Ray as far as joining needs it; `raises` is what asking the cluster ends with."""

    def __init__(self, raises: Exception | None = None) -> None:
        self.asked: list[str] = []
        self.joined: list[str] = []

        def ask(address: str) -> None:
            self.asked.append(address)
            if raises is not None:
                raise raises

        super().__init__(
            exceptions=SimpleNamespace(AuthenticationError=RefusedError, RpcError=NoAnswerError),
            _raylet=SimpleNamespace(GcsClient=ask),
            init=lambda address, **_: self.joined.append(address),
            _private=SimpleNamespace(utils=SimpleNamespace(set_sigterm_handler=None)),
        )


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only token that there is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("0123456789abcdef")
    return tmp_path / "token"


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("token", "does not let us in: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file"),
        ("", "does not let us in: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN, or"),
    ],
)
def test_a_cluster_that_refuses_our_token_is_asked_once(monkeypatch: pytest.MonkeyPatch, mode: str, says: str) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    ray = FakeRay(RefusedError("InvalidAuthToken"))
    with pytest.raises(InputError, match=says):
        connect(ray, None, "head:6379")
    assert ray.asked == ["head:6379"] and not ray.joined


def test_what_is_no_cluster_is_not_joined() -> None:
    ray = FakeRay(NoAnswerError("Timed out while waiting for GCS to become available."))
    with pytest.raises(InputError, match="no Ray cluster at 'head:8265': Timed out"):
        connect(ray, None, "head:8265")
    assert not ray.joined


def test_a_cluster_that_lets_us_in_is_joined() -> None:
    ray = FakeRay()
    connect(ray, None, "head:6379")
    assert ray.joined == ["head:6379"]


@pytest.mark.parametrize(("address", "there"), [("head:6379", False), ("auto", True)])
def test_ray_itself_is_left_to_say_that_there_is_no_token_and_to_find_the_head(
    monkeypatch: pytest.MonkeyPatch, token: Path, address: str, there: bool
) -> None:
    """Asked without the token that must be there, its client ends the whole process."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    if not there:
        token.unlink()
    ray = FakeRay()
    connect(ray, None, address)
    assert not ray.asked and ray.joined == [address]
