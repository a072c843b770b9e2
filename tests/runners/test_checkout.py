"""The checkout, run as the program it is, against real repositories: what ends up in ``src``, and what it says."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkout_world import ROOT, World, git, with_submodules

UrlOf = Callable[[Path], str]


@pytest.mark.parametrize("url", [str, lambda path: f"file://{path}"], ids=["path", "file"])
def test_any_way_to_name_a_commit(either: World, url: UrlOf) -> None:
    """A full id, a short one, a branch, a tag, a full ref, HEAD and an expression all end at the same commit."""
    origin = either.repository()
    first = git(origin, "rev-parse", "HEAD")
    git(origin, "tag", "-a", "-m", "annotated", "v1")
    git(origin, "branch", "topic/x")
    either.commit(origin, {"README": "later\n"}, "second")
    git(origin, "branch", "-m", "main", "trunk")
    for name in (
        first,
        first[:10],
        "topic/x",
        "v1",
        "refs/tags/v1",
        "refs/heads/topic/x",
        "HEAD~1",
        "trunk~1",
        "trunk^",
    ):
        result = either.good({"url": url(origin), "commit": name})
        assert git(result.src, "rev-parse", "HEAD") == first, name
        assert f'Checked out {first[:7]} "first"' in result.out
        assert (result.src / "README").read_text() == "hello\n"
    head = either.good({"url": url(origin), "commit": "HEAD"})
    assert (head.src / "README").read_text() == "later\n"


def test_what_is_left_is_whole(either: World) -> None:
    """The clone borrows nothing, has every branch and tag, is detached, and names the real origin."""
    origin = either.repository()
    git(origin, "tag", "v1")
    git(origin, "branch", "other")
    src = either.good({"url": str(origin), "commit": "main"}).src
    assert not (src / ".git/objects/info/alternates").exists()
    assert git(src, "remote", "get-url", "origin") == str(origin)
    assert git(src, "branch", "--show-current") == ""
    assert git(src, "tag") == "v1"
    assert "origin/other" in git(src, "branch", "-r")
    assert "credential" not in (src / ".git/config").read_text()
    assert git(src, "status", "--porcelain") == ""
    git(src, "fsck")
    for path in (src / ".git/objects").rglob("*.pack"):
        assert path.stat().st_nlink == 1, "a hard link into the mirror would be given to the job's user"


def test_full_id_that_the_mirror_has_needs_no_network(world: World) -> None:
    origin = world.repository()
    commit = git(origin, "rev-parse", "HEAD")
    assert "Fetching" in world.good({"url": str(origin), "commit": commit}).out
    origin.rename(world.root / "away")
    again = world.good({"url": str(origin), "commit": commit})
    assert "Fetching" not in again.out
    assert again.tree() == {"README", "lib/a.txt", "doc/b.txt"}


def test_mirror_takes_only_what_is_new(world: World) -> None:
    """A branch that has not moved is asked for, not fetched; one that has moved is followed, even when rewritten."""
    origin = world.repository()
    world.good({"url": str(origin), "commit": "main"})
    assert "Fetching" not in world.good({"url": str(origin), "commit": "main"}).out
    git(origin, "commit", "--amend", "-q", "-m", "rewritten")
    result = world.good({"url": str(origin), "commit": "main"})
    assert "Fetching" in result.out
    assert '"rewritten"' in result.out


def test_shallow(either: World) -> None:
    """``depth`` commits of history; deeper asks later get what they ask for, whatever was cached before."""
    origin = either.repository()
    for number in range(6):
        either.commit(origin, {"README": f"{number}\n"}, f"change {number}")
    middle = git(origin, "rev-parse", "HEAD~2")
    url = f"file://{origin}"

    def depth_of(commit: str, depth: int | None) -> int:
        src = either.good({"url": url, "commit": commit, "depth": depth}).src
        return int(git(src, "rev-list", "--count", "HEAD"))

    assert depth_of("main", 1) == 1
    assert depth_of("main", 4) == 4
    assert depth_of(middle, 1) == 1
    assert depth_of("main", 4) == 4
    assert depth_of("main", 3) == 3
    assert depth_of("main", 50) == 7
    assert depth_of("main", None) == 7
    assert depth_of("main", 2) == 2


def test_shallow_of_a_server_that_gives_no_commit_by_id(either: World) -> None:
    """Where only tips of branches are given, the whole is fetched and the commit found in it."""
    origin = either.repository()
    old = git(origin, "rev-parse", "HEAD")
    either.commit(origin, {"README": "new\n"}, "second")
    git(origin, "config", "uploadpack.allowAnySHA1InWant", "false")
    git(origin, "config", "uploadpack.allowReachableSHA1InWant", "false")
    git(origin, "config", "uploadpack.allowTipSHA1InWant", "false")
    result = either.good({"url": f"file://{origin}", "commit": old, "depth": 1})
    assert (result.src / "README").read_text() == "hello\n"


def test_partial(either: World) -> None:
    """With a filter, only the files of the commit itself come; the rest stays at the promisor."""
    origin = either.repository()
    old_blob = git(origin, "rev-parse", "HEAD:README")
    either.commit(origin, {"README": "new\n"}, "second")
    result = either.good({"url": f"file://{origin}", "commit": "main", "filter": "blob:none"})
    assert (result.src / "README").read_text() == "new\n"
    missing = git(result.src, "rev-list", "--objects", "--all", "--missing=print")
    assert f"?{old_blob}" in missing
    assert git(result.src, "config", "remote.origin.promisor") == "true"
    assert git(result.src, "config", "remote.origin.url") == f"file://{origin}"


def test_partial_from_a_mirror_that_is_there(world: World) -> None:
    origin = world.repository()
    commit = git(origin, "rev-parse", "HEAD")
    world.good({"url": f"file://{origin}", "commit": commit})
    origin.rename(world.root / "away")
    result = world.good({"url": f"file://{origin}", "commit": commit, "filter": "blob:none", "sparse": ["lib"]})
    assert result.tree() == {"README", "lib/a.txt"}


def test_sparse(either: World) -> None:
    origin = either.repository(files={"README": "r", "lib/a": "a", "lib/deep/b": "b", "-odd dir/c": "c", "doc/d": "d"})
    result = either.good({"url": str(origin), "commit": "main", "sparse": ["-odd dir", "lib/deep"]})
    assert result.tree() == {"README", "lib/a", "lib/deep/b", "-odd dir/c"}


def test_submodules_only_where_asked(either: World) -> None:
    outer = with_submodules(either)
    inner = "third party/middle/deps/inner/i"
    middle = "third party/middle/m"
    for asked, expected in ((False, set()), (True, {middle}), ("recursive", {middle, inner})):
        result = either.good({"url": str(outer), "commit": "main", "submodules": asked})
        assert result.tree() & {middle, inner} == expected
    assert git(result.src, "submodule", "status", "--recursive").count("\n") == 1
    assert git(result.src, "status", "--porcelain") == ""
    assert (result.src / "third party/middle/.git").is_file(), "git keeps a submodule's repository in the outer one"
    assert "mirrors" not in "".join(path.read_text() for path in result.src.rglob("config"))


def test_sparse_leaves_submodules_outside_alone(world: World) -> None:
    outer = with_submodules(world)
    world.commit(outer, {"lib/x": "x"}, "lib")
    result = world.good({"url": str(outer), "commit": "main", "submodules": True, "sparse": ["lib"]})
    assert result.tree() == {"o", "lib/x", ".gitmodules"}


def test_submodules_are_held_to_the_host_s_rules(world: World) -> None:
    outer = with_submodules(world)
    allow = [str(outer)]
    line = world.bad({"url": str(outer), "commit": "main", "submodules": True}, allow=allow)
    assert "third party/middle" in line
    assert "not allowed on this host" in line
    world.good({"url": str(outer), "commit": "main"}, allow=allow)


@pytest.mark.parametrize("url", ["ext::sh -c touch% /tmp/never", "--upload-pack=touch", "https://u:p@h/x"])
def test_submodule_with_a_url_that_no_job_may_name(world: World, url: str) -> None:
    outer = with_submodules(world)
    git(outer, "config", "-f", ".gitmodules", "submodule.third party/middle.url", url)
    git(outer, "commit", "-q", "-am", "evil")
    line = world.bad({"url": str(outer), "commit": "main", "submodules": True})
    assert "third party/middle" in line
    assert "u:p" not in line


def test_errors_say_what_is_wrong(either: World) -> None:
    origin = either.repository()
    missing = either.bad({"url": str(either.root / "nowhere"), "commit": "main"})
    assert "nowhere" in missing
    assert "the repository doesn't exist" in missing
    unknown = "1" * 40
    for commit in ("no-such-branch", unknown, "refs/heads/none"):
        line = either.bad({"url": f"file://{origin}", "commit": commit})
        assert commit in line
        assert "is not found" in line
    assert "is not found" in either.bad({"url": f"file://{origin}", "commit": unknown, "depth": 1})
    assert "can't be reached" in either.bad({"url": "http://127.0.0.1:1/x.git", "commit": "main"})
    assert "not allowed on this host" in either.bad({"url": str(origin), "commit": "main"}, allow=["https://*"])


def test_a_repository_that_appears_later_is_found(world: World) -> None:
    """A failed first fetch leaves no mirror behind that would stand in the way, nor does a killed one its locks."""
    world.bad({"url": str(world.root / "origin"), "commit": "main"})
    origin = world.repository()
    world.good({"url": str(origin), "commit": "main"})
    mirror = next((world.root / "mirrors").glob("*.git"))
    (mirror / "packed-refs.lock").touch()
    (mirror / "refs/heads/main.lock").touch()
    world.commit(origin, {"README": "new\n"}, "second")
    assert '"second"' in world.good({"url": str(origin), "commit": "main"}).out


@pytest.mark.parametrize("changed", [True, False])
def test_a_damaged_mirror_is_made_anew(world: World, changed: bool) -> None:
    """Whether the damage is found in fetching into it or in reading from it."""
    origin = world.repository()
    world.good({"url": str(origin), "commit": "main"})
    mirror = next((world.root / "mirrors").glob("*.git"))
    for path in (mirror / "objects").rglob("*"):
        if path.is_file():
            path.chmod(0o600)
            path.write_bytes(b"garbage")
    if changed:
        world.commit(origin, {"README": "new\n"}, "second")
    result = world.good({"url": str(origin), "commit": "main"})
    assert "Fetching" in result.out
    assert (result.src / "README").read_text() == ("new\n" if changed else "hello\n")


def test_a_blob_that_the_mirror_lost_is_noticed_in_reading(world: World) -> None:
    origin = world.repository()
    commit = git(origin, "rev-parse", "HEAD")
    world.good({"url": str(origin), "commit": commit})
    mirror = next((world.root / "mirrors").glob("*.git"))
    pack = next((mirror / "objects/pack").glob("*.pack"), None)
    if pack is not None:
        git(mirror, "unpack-objects", "-q", feed=pack.rename(world.root / "pack").read_bytes())
        pack.with_suffix(".idx").unlink()
    blob = git(origin, "rev-parse", "HEAD:README")
    (mirror / "objects" / blob[:2] / blob[2:]).unlink()
    result = world.good({"url": str(origin), "commit": commit})
    assert "The mirror is damaged" in result.out
    assert (result.src / "README").read_text() == "hello\n"


def test_nothing_of_the_repository_or_host_runs(world: World) -> None:
    """Hooks of a template, a filter of the repository's attributes, the user's config: none of them is used."""
    origin = world.repository(files={"a": "a\n", ".gitattributes": "* filter=evil\n", ".lfsconfig": "[lfs]\n"})
    home = world.root / "home"
    (home / "templates/hooks").mkdir(parents=True)
    hook = home / "templates/hooks/post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {home}/ran\n")
    hook.chmod(0o755)
    (home / ".gitconfig").write_text(
        f'[init]\n templateDir = {home}/templates\n[filter "evil"]\n smudge = touch {home}/ran\n'
    )
    world.environ = {"HOME": str(home), "GIT_TEMPLATE_DIR": str(home / "templates")}
    world.good({"url": str(origin), "commit": "main"})
    assert not (home / "ran").exists()


def test_files(world: World) -> None:
    """Written over the checkout; directories are made; a script can be run; a file there keeps its mode."""
    origin = world.repository()
    (origin / "tool").write_text("#!/bin/sh\n")
    (origin / "tool").chmod(0o755)
    world.commit(origin, {"x": "x"}, "tool")
    files = {"new/deep/f": "text é\n", "README": "mine\n", "run.sh": "#!/bin/sh\nexit 0\n", "tool": "plain\n"}
    src = world.good({"url": str(origin), "commit": "main"}, files=files).src
    for path, text in files.items():
        assert (src / path).read_text() == text
    assert stat.S_IMODE((src / "run.sh").stat().st_mode) == 0o755
    assert stat.S_IMODE((src / "new/deep/f").stat().st_mode) == 0o644
    assert stat.S_IMODE((src / "tool").stat().st_mode) == 0o755
    alone = world.good(files={"a": "b"})
    assert alone.tree() == {"a"}
    assert "Wrote 1 file\n" in alone.out


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "", "a//b", "./x"])
def test_files_that_leave_the_workspace(world: World, path: str) -> None:
    assert "leaves the workspace" in world.bad(files={path: "evil"})


def test_files_never_go_through_a_link_of_the_repository(world: World) -> None:
    origin = world.repository()
    outside = world.root / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    os.symlink(outside, origin / "dir")
    os.symlink(outside / "kept", origin / "file")
    os.symlink("lib", origin / "inside")
    world.commit(origin, {}, "links")
    for path in ("dir/x", "file", "inside/x", "dir"):
        line = world.bad({"url": str(origin), "commit": "main"}, files={path: "evil"})
        assert f"files['{path}']" in line
        assert "symbolic link" in line
    assert os.listdir(outside) == ["kept"]
    assert (outside / "kept").read_text() == "kept"
    assert "is a directory" in world.bad({"url": str(origin), "commit": "main"}, files={"lib": "x"})
    assert "leads through a file" in world.bad({"url": str(origin), "commit": "main"}, files={"README/x": "x"})


def test_two_at_once_share_one_mirror(world: World) -> None:
    """The second waits for the first's fetch, and both end well."""
    origin = world.repository()
    with ThreadPoolExecutor(2) as pool:
        commits = [{"url": str(origin), "commit": "main"}] * 2
        worlds = [World(world.root, runs=10 * (number + 1)) for number in range(2)]
        results = [pool.submit(one.good, commit) for one, commit in zip(worlds, commits, strict=True)]
        assert all(result.result().tree() for result in results)
    assert len(list((world.root / "mirrors").glob("*.git"))) == 1


def test_a_plan_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-S", "-s", "-P", "-m", "supervisor.runners.checkout", str(tmp_path / "plan.json")],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the checkout failed on this host")
