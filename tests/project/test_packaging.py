"""What surrounds the package agrees with it: version, dependencies, constraints, CI, issue forms, container file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from luthier import __version__
from luthier.cli.main import app
from tests.conftest import ROOT
from tests.helpers.layout import SOURCE, modules, typing_only

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = PYPROJECT["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
GITHUB = ROOT / ".github"
PYTHONS = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.fullmatch(r"Programming.* :: 3\.\d+", c)]
# modules whose package has another name, or is brought by the one that is named here
PACKAGES = {"google": "protobuf", "pydantic_core": "pydantic", "starlette": "fastapi", "yaml": "pyyaml"}
OPTIONAL = {"flash-attn"}  # used if it is installed; building it needs CUDA's compiler


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def pinned() -> dict[str, str]:
    """Return the version of every package in constraints.txt, by canonical name."""
    lines = [line.split("==") for line in text("constraints.txt").splitlines()]
    return {canonicalize_name(name): version for name, version in lines}


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if (ROOT / name).is_file()]


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(r).name) for r in requirements}


# --- version ----------------------------------------------------------------------------------------------------------


def test_the_version_is_a_constant_that_a_build_reads_without_importing() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "luthier.__version__"}
    values = [
        node.value
        for node in ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert [v.value for v in values if isinstance(v, ast.Constant)] == [__version__]
    assert PYPROJECT["build-system"]["requires"] == ["setuptools>=77"]


def test_pages_name_the_current_version() -> None:
    heading = re.search(r"^## (\S+)", text("CHANGELOG.md"), re.MULTILINE)
    assert heading and heading.group(1) == __version__
    for page, pattern in (("README.md", r"^Version (\d+\.\d+) "), ("README.zh-CN.md", r"^版本 (\d+\.\d+)\D")):
        for stated in re.findall(pattern, text(page), re.MULTILINE):
            assert f"{__version__}.".startswith(f"{stated}."), page


def test_the_version_is_written_in_three_places_only() -> None:
    """All others import it: adapters, checkpoints, estimates, the cache of rows, requests to hubs, doctor."""
    version = re.compile(rf"(?<![\w.]){re.escape(__version__)}(?!\.?\w)")
    files = [
        name for name in tracked() if not name.startswith("tests/") and not name.endswith((".png", "constraints.txt"))
    ]
    with_version = [name for name in files if version.search(text(name))]
    assert with_version == ["CHANGELOG.md", "CITATION.cff", "src/luthier/__init__.py"]


def test_the_citation_describes_this_package() -> None:
    citation = parsed(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "type"} <= set(citation)
    assert citation["title"] == PROJECT["name"]
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]
    assert citation["abstract"] == PROJECT["description"]
    assert citation["keywords"] == PROJECT["keywords"]
    assert citation["authors"] == PROJECT["authors"]


# --- metadata and dependencies ----------------------------------------------------------------------------------------


def test_the_classifiers_claim_what_is_supported() -> None:
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(f">={PYTHONS[0]}")
    assert [f"3.{minor}" for minor in range(11, 11 + len(PYTHONS))] == PYTHONS
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{PYTHONS[0].replace('.', '')}"
    assert [c for c in PROJECT["classifiers"] if c.startswith("Operating System")] == [
        "Operating System :: POSIX :: Linux"
    ]
    assert "Typing :: Typed" in PROJECT["classifiers"] and (SOURCE / "py.typed").is_file()
    assert not [c for c in PROJECT["classifiers"] if c.startswith("License")]  # the SPDX expression replaces them
    assert text("LICENSE").split()[:2] == ["Apache", "License"] and PROJECT["license"] == "Apache-2.0"


def imported(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Yield (top-level package, whether importing the module requires it) of every import that runs."""
    unseen = typing_only(tree)
    for node in ast.walk(tree):
        if id(node) not in unseen and isinstance(node, ast.Import | ast.ImportFrom):
            for name in [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]:
                yield name.partition(".")[0], node in tree.body


def third_party(trees: dict[str, ast.Module]) -> dict[str, set[bool]]:
    """Return the distributions that are imported, each with whether its imports are required."""
    packages: dict[str, set[bool]] = {}
    for tree in trees.values():
        for name, required in imported(tree):
            if name not in sys.stdlib_module_names | {"luthier"}:
                packages.setdefault(canonicalize_name(PACKAGES.get(name, name)), set()).add(required)
    return packages


def undeclared(trees: dict[str, ast.Module]) -> list[str]:
    """List packages that are imported but not declared, or required but only in an extra."""
    core = names(PROJECT["dependencies"])
    extras = names([r for name, extra in EXTRAS.items() if name != "dev" for r in extra])
    return [
        package
        for package, required in third_party(trees).items()
        if package not in core | OPTIONAL and (True in required or package not in extras)
    ]


def test_every_import_is_declared_and_extras_are_not_required() -> None:
    assert undeclared(modules()) == []
    assert undeclared({"luthier.x": ast.parse("import yaml, pyarrow")}) == ["pyarrow"]
    assert undeclared({"luthier.x": ast.parse("def f():\n    import pytest, scipy")}) == ["pytest", "scipy"]


def test_every_core_dependency_is_imported() -> None:
    assert names(PROJECT["dependencies"]) - set(third_party(modules())) == set()


def test_the_extra_dev_has_all_others() -> None:
    everything = next(Requirement(r) for r in EXTRAS["dev"] if Requirement(r).name == PROJECT["name"])
    assert everything.extras == set(EXTRAS) - {"dev"}
    direct = [r for extra in EXTRAS.values() for r in extra if Requirement(r).name != PROJECT["name"]]
    assert len(direct) == len(names(direct)), "a package is in two extras"


def test_the_constraints_pin_every_requirement() -> None:
    pins = pinned()
    lines = text("constraints.txt").splitlines()
    assert lines == sorted(lines, key=str.lower) and len(lines) == len(pins)
    for line in [*PROJECT["dependencies"], *(r for extra in EXTRAS.values() for r in extra)]:
        requirement = Requirement(line)
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line


# --- CI, hooks and forms ----------------------------------------------------------------------------------------------


def test_ci_runs_the_claimed_versions_of_python() -> None:
    job = parsed(GITHUB / "workflows" / "ci.yml")["jobs"]["test"]
    assert job["strategy"]["matrix"] == {
        "os": ["ubuntu-latest", "macos-latest", "windows-latest"],
        "python": PYTHONS,
    }
    assert job["runs-on"] == "${{ matrix.os }}"
    steps = job["steps"]
    python = next(s["with"] for s in steps if s.get("uses", "").startswith("actions/setup-python@"))
    assert python["python-version"] == "${{ matrix.python }}" and python["cache"] == "pip"
    for file in python["cache-dependency-path"].split():
        assert (ROOT / file).is_file()


def test_ci_runs_what_contributors_run() -> None:
    """On Linux everything, by the script that also runs elsewhere; without make, what `make test` does."""
    steps = parsed(GITHUB / "workflows" / "ci.yml")["jobs"]["test"]["steps"]
    runs = {
        system: [s["run"] for s in steps if s.get("if", "").startswith(f"runner.os == '{system}'")]
        for system in ("Linux", "macOS", "Windows")
    }
    assert sum(map(len, runs.values())) == len([s for s in steps if "run" in s])
    listed = subprocess.run(["git", "ls-files", "-s", ".ci/run"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert runs["Linux"][-1] == ".ci/run" and listed.stdout.startswith("100755")
    assert "make lint types" in text(".ci/run") and "make test" in text(".ci/run")
    assert runs["macOS"] == ["make test"]
    assert not [run for run in runs["Windows"] if run.startswith("make")]
    recipe = text("Makefile").split("\ntest:")[1].split("\n\n")[0].split("python ", 1)[1]
    assert runs["Windows"][-1] == f"python {recipe}"
    assert all(".[dev]" not in run or "-c constraints.txt" in run for run in runs["Windows"])


def test_workflows_have_few_rights_and_pinned_actions() -> None:
    for path in (GITHUB / "workflows").iterdir():
        workflow = parsed(path)
        assert workflow["permissions"] == {"contents": "read"}
        assert workflow["concurrency"]["group"]
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"]
            uses = [s["uses"] for s in job["steps"] if "uses" in s]
            assert uses and all(re.fullmatch(r"[\w-]+/[\w-]+@(v\d+(\.\d+)*|[0-9a-f]{40})", u) for u in uses)
            checkout = next(s for s in job["steps"] if s.get("uses", "").startswith("actions/checkout@"))
            assert checkout["with"]["persist-credentials"] is False


def test_issue_forms_are_complete() -> None:
    folder = GITHUB / "ISSUE_TEMPLATE"
    forms = {p.stem: parsed(p) for p in folder.glob("*.yml") if p.stem != "config"}
    assert set(forms) == {"bug", "idea"}
    assert parsed(folder / "config.yml") == {"blank_issues_enabled": False}
    for form in forms.values():
        assert form["name"] and form["description"]
        fields = [f for f in form["body"] if f["type"] != "markdown"]
        assert len({f["id"] for f in fields}) == len(fields)
        assert {f["type"] for f in fields} <= {"checkboxes", "dropdown", "input", "textarea"}
        assert all(f["attributes"]["label"] and isinstance(f["validations"]["required"], bool) for f in fields)
    required = {f["id"]: f["attributes"] for f in forms["bug"]["body"] if f.get("validations", {}).get("required")}
    assert {"command", "message", "doctor"} <= set(required)
    verb = required["doctor"]["placeholder"].split()
    assert verb[0] == "luthier" and verb[1:] == ["doctor"]
    assert "doctor" in {command.name for command in app.registered_commands}


def test_the_pull_request_template_names_commands_and_files_that_exist() -> None:
    page = (GITHUB / "pull_request_template.md").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)`", page):
        assert re.search(rf"^{target}:", text("Makefile"), re.MULTILINE)
    for file in re.findall(r"`([\w./-]+(?:\.md|/))`", page):
        assert (ROOT / file).exists()


def test_the_hooks_are_those_of_make_lint_in_its_versions() -> None:
    repositories = {r["repo"].rpartition("/")[2]: r for r in parsed(ROOT / ".pre-commit-config.yaml")["repos"]}
    assert set(repositories) == {"pre-commit-hooks", "ruff-pre-commit"}
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", r["rev"]) for r in repositories.values())
    ruff = repositories["ruff-pre-commit"]
    assert ruff["rev"] == f"v{pinned()['ruff']}"
    linted = re.findall(r"ruff (check|format --check) (.*)", text("Makefile"))
    assert [hook["id"] for hook in ruff["hooks"]] == [f"ruff-{command.split()[0]}" for command, _ in linted]
    for hook, (_, folders) in zip(ruff["hooks"], linted, strict=True):
        names = [name for name in tracked() if re.search(hook["files"], name) and name.endswith(".py")]
        assert names == [n for n in tracked() if n.endswith(".py") and n.startswith(tuple(folders.split()))]


def test_files_satisfy_the_hooks() -> None:
    """The hooks would otherwise change files that the commit does not touch."""
    excluded = re.compile(parsed(ROOT / ".pre-commit-config.yaml")["exclude"])
    faults = {}
    for name in tracked():
        data = (ROOT / name).read_bytes()
        if not data or b"\0" in data or excluded.search(name):
            continue
        ends = data.endswith(b"\n") and not data.endswith(b"\n\n")
        if not ends or b"\r" in data or re.search(rb"[ \t]+$", data, re.MULTILINE):
            faults[name] = data[-20:]
    assert faults == {}


# --- the container ----------------------------------------------------------------------------------------------------


def test_the_container_gets_the_files_that_a_build_needs() -> None:
    lines = [line.split() for line in text("Containerfile").splitlines()]
    copied = {word for line in lines if line[:1] == ["COPY"] for word in line[1:-1]}
    needed = {"pyproject.toml", "constraints.txt", "src", PROJECT["readme"], *PROJECT["license-files"]}
    assert copied == needed
    allowed = {line[1:] for line in text(".dockerignore").splitlines() if line.startswith("!")}
    assert allowed == needed
    assert all((ROOT / name).exists() for name in needed)


def test_the_container_runs_luthier_without_root() -> None:
    lines = text("Containerfile").splitlines()
    assert "not built by CI" in lines[0]
    assert lines.index("USER luthier") < lines.index('ENTRYPOINT ["luthier"]')
    assert "VOLUME /models" in lines
    assert 'ARG TORCH_INDEX=""' in lines and any("${TORCH_INDEX:+--index-url" in line for line in lines)
    assert any(re.match(r"ARG PYTHON=(.*)", line) and line.split("=")[1] in PYTHONS for line in lines)


# --- pages for people -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SECURITY.md", "CODE_OF_CONDUCT.md", ".github/pull_request_template.md"])
def test_lines_of_pages_are_short(name: str) -> None:
    assert [line for line in text(name).splitlines() if len(line) > 120] == []
