"""EasyEdit's hyperparameter files as settings of a run."""

import contextlib
import inspect
import io
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from grace_bench.cli import main
from grace_bench.errors import UserError
from grace_bench.launch.compose import compose
from grace_bench.launch.easyedit import import_easyedit
from grace_bench.launch.model_presets import presets
from grace_bench.launch.run_config import OPTIONS, SHORT
from grace_bench.launch.sweep import composed_runs
from grace_bench.registry import EDITORS

SHARED = Path(__file__).parents[2].parent / "shared" / "published" / "hyperparameters.jsonl"

MEMIT = """
alg_name: "MEMIT"
model_name: someone/some-model
stats_dir: "./data/stats"
device: 3
layers: [2, 3]
clamp_norm_factor: 1.5
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 7
v_lr: 3e-1
v_loss_layer: 11
v_weight_decay: 1e-2
kl_factor: 0.125
mom2_adjustment: true
mom2_update_weight: 900
rewrite_module_tmp: "transformer.h.{}.mlp.c_proj"
layer_module_tmp: "transformer.h.{}"
mom2_dataset: "wikipedia"
mom2_n_samples: 50
mom2_dtype: "float32"
batch_size: 20
model_parallel: false
"""


def written(folder: Path, content: str, name: str = "hparams.yaml") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def cli(*arguments: str | Path) -> tuple[int, list[str], list[str]]:
    """The exit code of a command, and the lines of its output and its errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(map(str, arguments)))
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


def refused(folder: Path, content: str) -> str:
    """The one line that says what is wrong with a file."""
    code, out, err = cli("import-easyedit", written(folder, content))
    assert (code, out, len(err)) == (2, [], 1)
    return err[0]


def test_the_command_prints_options_and_names_what_has_no_counterpart(tmp_path: Path) -> None:
    path = written(tmp_path, MEMIT)
    code, out, err = cli("import-easyedit", path)
    assert code == 0
    assert out == [
        "editor=memit",
        "model=someone/some-model",
        "layer=transformer.h.3.mlp.c_proj",
        "editor.layers=[transformer.h.2.mlp.c_proj,transformer.h.3.mlp.c_proj]",
        "editor.clamp=1.5",
        "editor.fact_token=subject_last",
        "editor.n_iter=7",
        "editor.lr=0.3",
        "editor.weight_decay=0.01",
        "editor.kl_weight=0.125",
        "editor.moment_weight=900",
        "editor.n_texts=50",
        "edits_at_once=20",
    ]
    for field, why in (("device", "device="), ("mom2_dataset", "editor.text_path="), ("stats_dir", "moments_path")):
        (line,) = (line for line in err if f"field '{field}'" in line)
        assert line.startswith(f"grace-bench: {path}:{MEMIT.splitlines().index(next_line(field)) + 1}: ")
        assert "has no counterpart" in line
        assert why in line
    # What the printed options say is what a run takes.
    run = compose(["stream=toy", *out])
    assert (run.editor.name, run.edits_at_once, run.layer) == ("memit", 20, "transformer.h.3.mlp.c_proj")
    assert run.editor.settings["lr"] == 0.3


def next_line(field: str) -> str:
    return next(line for line in MEMIT.splitlines() if line.startswith(f"{field}:"))


def test_a_written_file_gives_a_run_the_same_settings_and_is_never_overwritten(tmp_path: Path) -> None:
    path, out = written(tmp_path, MEMIT), tmp_path / "memit.yaml"
    code, options, _ = cli("import-easyedit", path, "--out", out)
    assert code == 0
    run = compose(["stream=toy", f"tuned={out}"])
    typed = compose(["stream=toy", "tuning_budget=EasyEdit", *options])
    assert run == typed
    assert compose(["stream=atlas-facts", f"tuned={out}", "editor.n_iter=9"]).editor.settings["n_iter"] == 9
    runs = [run.config for run in composed_runs([["stream=toy,atlas-facts", f"tuned={out}", "seed=0,1"]], "sweep")]
    assert [(run.stream.name, run.editor.settings["n_iter"], run.seed) for run in runs if run is not None] == [
        ("toy", 7, 0),
        ("toy", 7, 1),
        ("atlas-facts", 7, 0),
        ("atlas-facts", 7, 1),
    ]
    content = out.read_bytes()
    code, options, err = cli("import-easyedit", path, "--out", out)
    assert (code, options) == (2, [])
    assert f"{out}: exists already" in err[0]
    assert out.read_bytes() == content


def test_json_with_an_alg_name_is_read_too(tmp_path: Path) -> None:
    content = {"alg_name": "memit", "layers": [3], "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj", "v_lr": 1e-05}
    imported = import_easyedit(written(tmp_path, json.dumps(content, indent=4), "gpt2-xl.json"))
    assert imported.settings["editor.lr"] == 1e-05
    assert imported.settings["editor.layers"] == ["transformer.h.3.mlp.c_proj"]


def test_a_file_for_another_editor_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "memit.yaml"
    assert cli("import-easyedit", written(tmp_path, MEMIT), "--out", out)[0] == 0
    with pytest.raises(UserError, match=r"settings of editor memit, not of rome"):
        compose(["stream=toy", f"tuned={out}", "editor=rome"])
    with pytest.raises(UserError, match=r"gone.yaml: cannot be read"):
        compose(["stream=toy", f"tuned={tmp_path / 'gone.yaml'}"])
    nameless = written(tmp_path, "editor: {n_iter: 3}", "nameless.yaml")
    with pytest.raises(UserError, match=r"nameless.yaml: field 'editor.name'"):
        compose(["stream=toy", f"tuned={nameless}"])


@pytest.mark.parametrize(
    ("content", "options", "remarks"),
    [
        (
            "alg_name: GRACE\nmodel_name: m\ninner_params:\n- model.layers[2].mlp.down_proj.weight\nedit_lr: 1e-1\n"
            "eps: 2.0\ndist_fn: cos\nval_train: pert\nval_reg: None\nreplacement: replace_last\n",
            ["layer=model.layers.2.mlp.down_proj", "editor.eps_init=2.0", "editor.distance=cosine", "editor.lr=0.1"],
            ["'val_train': pert has no counterpart, here it is always sgd"],
        ),
        (
            "alg_name: R-ROME\nlayers: [4]\nrewrite_module_tmp: transformer.h.{}.mlp.fc_out\nmom2_adjustment: false\n"
            "context_template_length_params: [[3, 6], [8, 6]]\nenable_prompt_keys: true\nfp16: true\n",
            [
                "editor=r_rome",
                "layer=transformer.h.4.mlp.fc_out",
                "editor.second_moments=false",
                "editor.prefix_lengths=[3,8]",
                "editor.n_prefixes=6",
                "editor.prompt_key=true",
                "dtype=float16",
            ],
            [],
        ),
        (
            "alg_name: ROME\nlayers: [1, 2]\nrewrite_module_tmp: h.{}.out\n"
            "context_template_length_params: [[3, 6], [8, 7]]\n",
            ["layer=h.2.out"],
            ["'layers': rome edits one layer here", "'context_template_length_params': has no counterpart"],
        ),
        (
            "alg_name: FT\nlayers: [3]\nrewrite_module_tmp: model.layers.{}.mlp.down_proj.weight\nnum_steps: 4\n"
            "lr: 2e-4\nobjective_optimization: prompt_last\nnorm_constraint: 5e-3\nweight_decay: 0\nkl_factor: 0.5\n",
            ["layer=model.layers.3.mlp.down_proj", "editor.objective=last_token", "editor.norm_constraint=0.005"],
            [
                "'weight_decay': 0 has no counterpart, and needs none",
                "'kl_factor': 0.5 has no counterpart, here it is always 0",
            ],
        ),
        (
            "alg_name: WISE\ninner_params: ['model.layers[5].mlp.down_proj.weight']\nact_margin: [1.0, 9.0, 3.0]\n"
            "densities: 0.4\nmerge_alg: median\nretrieve: true\nuse_chat_template: true\nmodel_parallel: true\n",
            ["editor.act_margin=[1.0,9.0,3.0]", "editor.density=0.4", "chat=true", "device_map=auto"],
            ["'merge_alg': median has no counterpart; these have: ties"],
        ),
        (
            "alg_name: MELO\nmodel: {name: m, grace_layer: transformer.h.5.mlp.c_fc,\n"
            "  target_modules: [transformer.h.6.mlp.c_fc]}\ngrace: {num_iter: 9, num_block: 30, edit_lr: 0.002}\n",
            [
                "model=m",
                "layer=transformer.h.5.mlp.c_fc",
                "editor.layers=[transformer.h.6.mlp.c_fc]",
                "editor.n_iter=9",
                "editor.n_blocks=30",
                "editor.lr=0.002",
            ],
            [],
        ),
        (
            "alg_name: MALMEN\ninner_params: [transformer.h.4.mlp.c_proj.weight, transformer.h.5.mlp.c_proj.weight]\n"
            "rank: 96\nn_blocks: 3\nlr: 1e-5\nmeta_lr: 1e-4\nloc_coef: 2\ntoken: mask\nn_edits: 8\n",
            [
                "editor.layers=[transformer.h.4.mlp.c_proj,transformer.h.5.mlp.c_proj]",
                "editor.edit_lr=1e-05",
                "editor.lr=0.0001",
                "editor.tokens=all",
                "editor.batch_size=8",
            ],
            ["'n_edits': is editor.batch_size=8"],
        ),
        (
            "alg_name: MEND\ninner_params: [model.layers.4.mlp.up_proj.weight]\nlr: 1e-5\ncedit: 0.2\nmax_iters: 700\n"
            "opt: SGD\nshared: true\n",
            ["editor.c_edit=0.2", "editor.n_steps=700"],
            ["'opt': SGD has no counterpart, here it is always Adam", "'shared': has no counterpart"],
        ),
        (
            "alg_name: SERAC\nsmall_name: ./small\ncls_name: ./bert\ndist_heads: 2\ninner_params: []\nsquare: false\n"
            "soft_weighting: true\n",
            [
                "editor.counterfactual=./small",
                "editor.classifier=./bert",
                "editor.distance=euclidean",
                "editor.mixing=soft",
            ],
            ["'inner_params': has no counterpart"],
        ),
        (
            "alg_name: IKE\nk: 12\nsentence_model_name: ./encoder\n",
            ["editor.k=12", "editor.encoder=./encoder"],
            ["editor.by="],
        ),
        (
            "alg_name: LoRA\nrank: 4\nlora_alpha: 16\nlora_type: adalora\ntarget_modules: [q_proj]\nlayers: []\n",
            ["editor=lora", "editor.r=4", "editor.alpha=16"],
            ["adalora has no counterpart, here it is always lora", "'target_modules': has no counterpart"],
        ),
        (
            "alg_name: EMMET\nlayers: [5]\nrewrite_module_tmp: h.{}.out\nupdate_norm_lambda: 1\nemmet_lambda: 0.2\n",
            ["editor.layers=[h.5.out]", "editor.ridge=1", "editor.softness=0.2"],
            [],
        ),
        (
            "alg_name: AlphaEdit\nlayers: [5]\nrewrite_module_tmp: h.{}.out\nnullspace_threshold: 1e-2\nL2: 3\n"
            "P_loc: ./p.pt\nmom2_update_weight: 10\n",
            ["editor.threshold=0.01", "editor.l2=3"],
            ["'nullspace_threshold': is editor.threshold=0.01; the bound is absolute", "'P_loc': has no counterpart"],
        ),
        (
            "alg_name: ULTRAEDIT\ninner_params: [model.layers.1.mlp.down_proj]\nlr: 1e-6\ntoken: ans\nbatch_size: 30\n"
            "batch_size_once: 6\nhalf: true\n",
            ["editor=ultraedit", "edits_at_once=30", "editor.batch_size=6", "dtype=bfloat16", "editor.tokens=ans"],
            [],
        ),
        (
            "alg_name: DEFER\ninner_params: ['h[3].out.weight']\nedit_lr: 7e-3\nn_iter: 3\nthreshold: 0.4\n",
            ["editor=defer", "layer=h.3.out", "editor.threshold=0.4"],
            [],
        ),
        ("alg_name: DEFER\ninner_params: []\n", ["editor=defer"], ["names no layer"]),
        ("alg_name: DEFER\nn_itr: 3\n", ["editor=defer"], ["did you mean 'n_iter'?", "'inner_params': is missing"]),
    ],
)
def test_each_algorithm_is_read(content: str, options: list[str], remarks: list[str], tmp_path: Path) -> None:
    code, out, err = cli("import-easyedit", written(tmp_path, content))
    assert code == 0, err
    assert set(options) <= set(out)
    for remark in remarks:
        assert any(remark in line for line in err), err
    # Hydra takes every line as it is printed, and the editor has every option.
    compose(["stream=atlas-facts", *out])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("alg_name: MEMTI\n", "hparams.yaml:1: field 'alg_name': no algorithm MEMTI is known; did you mean 'MEMIT'?"),
        ("alg_name: PMET\n", "hparams.yaml:1: field 'alg_name': no editor here does what PMET does"),
        ("layers: [1]\n", "hparams.yaml: field 'alg_name': is missing"),
        ("alg_name: ROME\nv_lr: fast\n", "hparams.yaml:2: field 'v_lr': should be a number, not fast"),
        (
            "alg_name: ROME\nv_num_grad_steps: 1.5\n",
            "hparams.yaml:2: field 'v_num_grad_steps': should be a whole number",
        ),
        ("alg_name: ROME\n\nmom2_adjustment: 3\n", "hparams.yaml:3: field 'mom2_adjustment': should be true or false"),
        ("alg_name: MEMIT\nbatch_size: 0\n", "hparams.yaml:2: field 'batch_size': edits_at_once=0"),
        ("alg_name: GRACE\ninner_params: 3\n", "hparams.yaml:2: field 'inner_params': should be a list"),
        (
            "alg_name: GRACE\ninner_params: ['a b']\n",
            "hparams.yaml:2: field 'inner_params': should be the path of a layer",
        ),
        (
            "alg_name: ROME\nlayers: [x]\nrewrite_module_tmp: h.{}\n",
            ":2: field 'layers': should be a list of block numbers",
        ),
        (
            "alg_name: ROME\nlayers: [1]\nrewrite_module_tmp: h\n",
            ":3: field 'rewrite_module_tmp': should be a path with {}",
        ),
        (
            "alg_name: ROME\ncontext_template_length_params: [5]\n",
            ":2: field 'context_template_length_params': should be",
        ),
        ("alg_name: ROME\nv_lr: 1\nv_lr: 2\n", "hparams.yaml:3: field 'v_lr': is given twice"),
        ("alg_name: ROME\nlayers: [1, 2\n", "field 'layers': is not YAML"),
        ("alg_name: ROME\nv_lr: 'x\n", "field 'v_lr': is not YAML"),
        ("alg_name: ROME\n\tv_lr: 1\n", "hparams.yaml:2: field 'v_lr': is not YAML"),
        ("- 1\n", "hparams.yaml: should hold settings"),
        ("", "hparams.yaml: should hold settings"),
        ("alg_name: ROME\nv_lr: ${oc.env:HOME}\n", "hparams.yaml:2: "),
        ("alg_name: &a ROME\nalg: *a\n", "hparams.yaml:2: "),
        ("alg_name: ROME\nv_lr: !!python/object/apply:os.system [touch here]\n", "hparams.yaml:2: field 'v_lr': is a "),
        ("alg_name: ROME\nv_lr: !own 3\n", "hparams.yaml:2: field 'v_lr': is a '!own'"),
    ],
)
def test_a_damaged_file_is_one_line_with_file_line_and_field(content: str, says: str, tmp_path: Path) -> None:
    assert says in refused(tmp_path, content)
    assert [path.name for path in tmp_path.iterdir()] == ["hparams.yaml"]


@pytest.mark.parametrize(
    "content",
    [
        "editor: {name: ft, _target_: pathlib.Path.touch}",
        "editor: {name: ft, lr: '${oc.env:HOME}'}",
        "editor: {name: ft}\nlayer: !!python/object/apply:os.getcwd []",
        "editor: {name: nobody}",
        "editor: {name: ft, lrr: 1}",
        "editor: {name: ft}\nseed: 1",
    ],
)
def test_a_strangers_settings_are_values_only(content: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        compose(["stream=toy", f"tuned={written(tmp_path, content)}"])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_one_line(tmp_path: Path) -> None:
    assert "gone.yaml: cannot be read" in cli("import-easyedit", tmp_path / "gone.yaml")[2][0]
    assert ": cannot be read" in cli("import-easyedit", tmp_path)[2][0]
    (tmp_path / "bytes.yaml").write_bytes(b"alg_name: \xff\n")
    assert "bytes.yaml: is not YAML" in cli("import-easyedit", tmp_path / "bytes.yaml")[2][0]


def table() -> dict[str, Any]:
    path = files("grace_bench.launch") / "published" / "easyedit.yaml"
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def named_options(rules: dict[str, Any]) -> Iterator[str]:
    for rule in rules.values():
        if isinstance(rule, str):
            yield rule
        else:
            yield from (rule[key] for key in ("option", "lengths") if key in rule)
            assert "option" in rule or "why" in rule
            assert set(rule) <= {"option", "values", "lengths", "only", "why", "note"}


def test_the_table_names_only_options_that_there_are() -> None:
    for option in named_options(table()["of_every_algorithm"]):
        assert SHORT.get(option, option) in OPTIONS
    for algorithm in table()["algorithms"].values():
        if algorithm is None:
            continue
        parameters = inspect.signature(EDITORS.get(algorithm["editor"])).parameters
        for option in named_options(algorithm["fields"]):
            assert option in OPTIONS or option.removeprefix("editor.") in parameters


@pytest.mark.skipif(not SHARED.is_file(), reason=f"the published settings are not at {SHARED}")
def test_the_published_files_are_read_as_the_presets_have_them(tmp_path: Path) -> None:
    given = [json.loads(line) for line in SHARED.read_text(encoding="utf-8").splitlines()]
    ours = {preset.source: preset for preset in presets()}
    names = {algorithm["editor"]: name for name, algorithm in table()["algorithms"].items() if algorithm is not None}
    n_read = 0
    for row in given:
        if not row["source"].startswith("zjunlp/EasyEdit@") or row["editor"] not in names:
            continue
        content = {"alg_name": names[row["editor"]], **row["values"]}
        imported = import_easyedit(written(tmp_path, yaml.safe_dump(content)))
        preset = ours[row["source"]]
        options = {
            name.removeprefix("editor."): value
            for name, value in imported.settings.items()
            if name.startswith("editor.") and name != "editor.layers"
        }
        # A preset leaves out what is the editor's default, and keeps the blocks' own default.
        defaults = inspect.signature(EDITORS.get(imported.editor)).parameters
        expected = {name: value for name, value in preset.options.items() if name != "layers"}
        for name in options.keys() | expected.keys():
            default = defaults[name].default
            assert options.get(name, default) == expected.get(name, default), (row["source"], name)
        if preset.layers:
            assert imported.settings["layer"] == preset.layers[-1], row["source"]
        n_read += 1
    assert n_read > 60
