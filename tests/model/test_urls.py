"""Git URLs: what a host's patterns allow, and what a submodule's relative one means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.model.errors import InvalidInput
from supervisor.model.urls import check_url, is_allowed, resolve_submodule_url


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("https://h/x.git", "https"),
        ("http://h:8080/x", "http"),
        ("ssh://git@h/x", "ssh"),
        ("git@h:team/x.git", "ssh"),
        ("h:x", "ssh"),
        ("git://h/x", "git"),
        ("file:///srv/x", "file"),
        ("/srv/x", "path"),
        ("/srv/a..b/x", "path"),
    ],
)
def test_any_git_url_is_taken(url: str, scheme: str) -> None:
    assert check_url(url, "repository.url") == scheme


@pytest.mark.parametrize(
    "url", ["/a/%2e%2e/b", "https://h/../x", "git@h:../x", "/a/..", "file://other/x", "https://-x/y"]
)
def test_urls_that_are_not_what_they_seem(url: str) -> None:
    with pytest.raises(InvalidInput):
        check_url(url, "repository.url")


@pytest.mark.parametrize(
    ("url", "pattern", "allowed"),
    [
        ("https://h/x", "*", True),
        ("https://git.example.org/a/b", "https://*.example.org/*", True),
        ("https://evil.test/.example.org/b", "https://*.example.org/*", False),
        ("https://git.example.org.evil.test/b", "https://git.example.org*/*", True),
        ("https://git.example.org.evil.test/b", "https://git.example.org/*", False),
        ("https://git.example.org.evil.test/b", "https://git.example.org", False),
        ("https://git.example.org/b", "https://git.example.org", True),
        ("https://GIT.example.org/b", "https://git.example.org/*", True),
        ("http://git.example.org/b", "https://git.example.org/*", False),
        ("git@h:team/x", "ssh://h/team/*", True),
        ("git@h:team/x", "git@h:team/*", True),
        ("ssh://git@h/team/x", "h:team/*", True),
        ("/srv/git/x", "/srv/git/*", True),
        ("/srv/git/x", "file:///srv/git/*", True),
        ("file:///srv/git/x", "/srv/git/*", True),
        ("/etc/x", "/srv/git/*", False),
        ("/srv/git/x", "https://*", False),
    ],
)
def test_allowed_urls(url: str, pattern: str, allowed: bool) -> None:
    assert is_allowed(url, [pattern]) is allowed


def test_no_pattern_allows_nothing() -> None:
    assert not is_allowed("https://h/x", [])


@given(st.text(max_size=30), st.text(alphabet="ahxs:/*@.", max_size=12))
def test_patterns_never_fail(url: str, pattern: str) -> None:
    assert is_allowed(url, [pattern]) in (True, False)


@pytest.mark.parametrize(
    ("url", "parent", "expected"),
    [
        ("https://h/x", "https://h/a/b", "https://h/x"),
        ("../x.git", "https://h/a/b.git", "https://h/a/x.git"),
        ("../../x", "https://h/a/b", "https://h/x"),
        ("./x", "/srv/a", "/srv/a/x"),
        ("../x", "/srv/a/", "/srv/x"),
        ("../x", "git@h:a/b", "git@h:a/x"),
        ("../../x", "git@h:a/b", "git@h:x"),
        (".././x", "https://h/a/b", "https://h/a/x"),
    ],
)
def test_relative_urls_of_submodules(url: str, parent: str, expected: str) -> None:
    assert resolve_submodule_url(url, parent) == expected


@pytest.mark.parametrize(("url", "parent"), [("../../x", "https://h/a"), ("../../x", "git@h:a"), ("../../x", "/a")])
def test_relative_urls_that_leave_their_parent_s_server(url: str, parent: str) -> None:
    with pytest.raises(InvalidInput, match="leaves its parent"):
        resolve_submodule_url(url, parent)
