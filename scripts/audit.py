"""Checks the installed packages for known vulnerabilities: `make audit`.

    python scripts/audit.py [VENV]

Runs pip-audit from a separate environment (`VENV`, default `.venv-audit`), so that pip-audit's own dependencies are not
audited too. Exits with 1 if a vulnerability is found. If no vulnerability service answers, prints one line that nothing
was audited and exits with 0.
"""

import json
import re
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

REQUIREMENT = "pip-audit>=2.9"
SERVICES = ("pypi", "osv")
_UNREACHED = re.compile(r"connect|resolve|timed? ?out|proxy|ssl|certificate|unreachable|HTTPError", re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """The answer of one vulnerability service.

    Attributes:
        lines: The lines to print.
        code: The exit code; None if the service did not answer.
    """

    lines: list[str]
    code: int | None


def main() -> int:
    """Audits the packages installed for this interpreter and prints the result."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".venv-audit")
    packages = installed()
    try:
        command = install(folder)
    except subprocess.CalledProcessError as error:
        print(f"audit: nothing was audited: {REQUIREMENT} cannot be installed here ({last_line(error.stderr)})")
        return 0
    reasons = []
    for service in SERVICES:
        found = ask(command, service, packages)
        if found.code is not None:
            print("\n".join(f"audit: {line}" for line in found.lines))
            return found.code
        reasons.append(f"{service}: {' '.join(found.lines)}")
    print(f"audit: nothing was audited: no service that lists vulnerabilities answers here ({'; '.join(reasons)})")
    return 0


def installed() -> dict[str, str]:
    """Returns the installed packages with their versions on the package index, without this project."""
    found = {package.metadata["Name"]: package.version for package in distributions()}
    # Builds for different devices (`2.6.0+cu124`) share one version on the index.
    return {name: version.partition("+")[0] for name, version in sorted(found.items()) if name != "grace-bench"}


def install(folder: Path) -> Path:
    """Returns the path of pip-audit in a separate environment, and installs it there if it is missing.

    Raises:
        subprocess.CalledProcessError: If pip-audit cannot be installed.
    """
    scripts = folder / ("Scripts" if sys.platform == "win32" else "bin")
    if not (scripts / "pip-audit").exists():
        venv.create(folder, with_pip=True)
        command = [str(scripts / "python"), "-m", "pip", "install", "--quiet", REQUIREMENT]
        subprocess.run(command, check=True, capture_output=True, text=True)
    return scripts / "pip-audit"


def ask(pip_audit: Path, service: str, packages: dict[str, str]) -> Verdict:
    """Returns the verdict of one service on the packages."""
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()), encoding="utf-8")
        options = ["--requirement", str(requirements), "--no-deps", "--disable-pip", "--vulnerability-service", service]
        options += ["--format", "json", "--desc", "off", "--progress-spinner", "off", "--timeout", "10"]
        done = subprocess.run([str(pip_audit), *options], capture_output=True, text=True, check=False)
    return judge(done.stdout, done.stderr)


def judge(report: str, errors: str) -> Verdict:
    """Returns the verdict in pip-audit's JSON report.

    The exit code of pip-audit is not enough: it is the same for a vulnerability and for an unreachable service, and the
    same for an index that found no vulnerability and for one that has no vulnerability data and so knows no package.

    Args:
        report: The standard output of pip-audit.
        errors: The standard error of pip-audit.
    """
    try:
        packages = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = last_line(errors)
        if _UNREACHED.search(errors):
            return Verdict([reason], None)
        return Verdict([f"pip-audit failed: {reason}"], 2)
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        return Verdict([f"it knows none of {len(packages)} packages"], None)
    lines = []
    for package in audited:
        for found in package["vulns"]:
            mended = " or ".join(found["fix_versions"]) or "no version"
            lines.append(f"{package['name']} {package['version']}: {found['id']}, mended in {mended}")
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    code = 1 if lines else 0
    lines.append(f"{len(audited)} packages audited, {len(lines)} vulnerabilities")
    if skipped:
        lines.append(f"not audited, unknown to the service: {', '.join(skipped)}")
    return Verdict(lines, code)


def last_line(text: str) -> str:
    """Returns the last non-empty line, truncated to 200 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or ["no reason given"])[-1][:200]


if __name__ == "__main__":
    raise SystemExit(main())
