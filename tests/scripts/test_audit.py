"""Dependencies: what is imported is declared and bounded below, and what `make audit` makes of pip-audit's answers."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
REQUIREMENTS = [*PROJECT["project"]["dependencies"], *(item for extra in EXTRAS.values() for item in extra)]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("requirement", [*REQUIREMENTS, *PROJECT["build-system"]["requires"]])
def test_a_dependency_is_bounded_below(requirement: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._-]+(\[\w+\])?>=\d+(\.\d+)*", requirement)


def test_what_is_imported_is_declared() -> None:
    imported = set()
    for package in ("grace_bench", "grace_bench.streams", "grace_bench.editors", "grace_bench.metrics"):
        for path in Path(str(files(package))).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    imported.add(node.module.partition(".")[0])
    distributions = packages_distributions()
    declared = {normal(re.split(r"[>=\[]", requirement)[0]) for requirement in REQUIREMENTS}
    # Comes with pydantic, in the one version that fits.
    foreign = imported - sys.stdlib_module_names - {"grace_bench", "pydantic_core"}
    undeclared = [
        name for name in sorted(foreign) if not declared & {normal(found) for found in distributions.get(name, [name])}
    ]
    assert undeclared == []


AWAY = "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='api.osv.dev', port=443): Max retries exceeded"
UNKNOWN = '{"dependencies": [{"name": "numpy", "skip_reason": "Dependency not found on PyPI"}], "fixes": []}'
CLEAN = '{"dependencies": [{"name": "numpy", "version": "2.0.0", "vulns": []}, {"name": "x", "skip_reason": "no"}]}'
FOUND = (
    '{"dependencies": [{"name": "jinja2", "version": "3.1.5", "vulns": [{"id": "CVE-2025-27516", "fix_versions": '
    '["3.1.6"], "aliases": ["GHSA-cpwx-vrp4-4pq7"]}]}, {"name": "numpy", "version": "2.0.0", "vulns": []}]}'
)


@pytest.mark.skipif(os.name != "posix", reason="what stands in for pip-audit is a shell script")
@pytest.mark.parametrize(
    ("report", "errors", "pip_audit_code", "code", "says"),
    [
        ("", AWAY, 1, 0, ["nothing was audited: no service"]),
        (UNKNOWN, "No known vulnerabilities found", 0, 0, ["nothing was audited: no service", "knows none of 1"]),
        (CLEAN, "No known vulnerabilities found", 0, 0, ["1 packages audited, 0 vuln", "not audited, unknown", ": x"]),
        (FOUND, "Found 1 known vulnerability in 1 package", 1, 1, ["jinja2 3.1.5: CVE-2025-27516, mended in 3.1.6"]),
        ("", "TypeError: something else is wrong", 1, 2, ["pip-audit failed: TypeError"]),
    ],
    ids=["away", "index without vulnerabilities", "clean", "found", "broken"],
)
def test_an_audit_tells_a_vulnerability_from_a_service_that_is_away(
    report: str, errors: str, pip_audit_code: int, code: int, says: list[str], tmp_path: Path
) -> None:
    stand_in = tmp_path / "bin" / "pip-audit"
    stand_in.parent.mkdir()
    for name, text in (("report", report), ("errors", errors)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    stand_in.write_text(
        f"#!/bin/sh\ncat {tmp_path / 'report'}\ncat {tmp_path / 'errors'} >&2\nexit {pip_audit_code}\n",
        encoding="utf-8",
    )
    stand_in.chmod(0o755)
    command = [sys.executable, str(ROOT / "scripts" / "audit.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    for text in says:
        assert text in done.stdout
    if "nothing" in says[0]:
        assert done.stdout.count("\n") == 1
