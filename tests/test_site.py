"""The documentation as a site: every page is listed and links lead somewhere; built, it is read in a real browser."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")
PHONE, DESK = 390, 1280


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_listed_and_its_links_lead_somewhere(page: Path) -> None:
    assert re.search(rf"[ :-] {page.name}$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    if page.name != "getting-started.md":
        assert f"]({page.name})" in (DOCS / "getting-started.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = urlsplit(target).path
        if not urlsplit(target).scheme and path:
            assert (DOCS / path).exists(), target


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it: strictly."""
    if find_spec("mkdocs") is None or find_spec("material") is None or find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs-material and mkdocstrings are not installed (the extra docs)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.mark.slow
def test_the_reference_is_written_from_the_code(site: Path) -> None:
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for command in ("run", "leaderboard", "pretrain"):
        assert f'<h2 id="{command}">' in commands
        assert f"usage: grace-bench {command}" in commands
    configuration = (site / "reference" / "configuration.html").read_text(encoding="utf-8")
    for option in ("edits_at_once=1", "editor.eps_init=1.0", "stream.upstream_path=null"):
        assert f"<code>{option}</code>" in configuration
    assert "EditorStrategy" in (site / "reference" / "python.html").read_text(encoding="utf-8")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_every_page_fits_the_screen_and_asks_no_other_server(site: Path, browser: webdriver.Chrome, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 35
    for page in pages:
        if page.name == "404.html":
            continue
        browser.get_log("performance")
        browser.get(page.as_uri())
        name, wide = page.relative_to(site), browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, f"{name} is {wide} wide"
        assert browser.execute_script("return document.querySelector('article h1').textContent.length") > 5, name
        assert [address for address in requests_of(browser) if not is_of(site, address)] == [], name


def requests_of(browser: webdriver.Chrome) -> Iterator[str]:
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            yield message["params"]["request"]["url"]


def is_of(site: Path, address: str) -> bool:
    parts = urlsplit(address)
    return parts.scheme == "data" or (parts.scheme == "file" and Path(unquote(parts.path)).is_relative_to(site))
