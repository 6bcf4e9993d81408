"""The configuration of a run: one declaration of every option, and hashes that stay what they were."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from grace_bench.cli import main
from grace_bench.errors import UserError
from grace_bench.launch.arguments import run_settings
from grace_bench.launch.compose import compose
from grace_bench.launch.run_config import OPTIONS, RunConfig, default_options, hash_config, make_editor, setting_name
from grace_bench.launch.run_folder import read_plain_config, write_config
from grace_bench.launch.sweep import sweep_name
from grace_bench.models.tokens import TextFormat
from grace_bench.run.settings import CapabilitySettings, RunSettings, Schedule

TOY = ("stream=toy", "editor=grace")
TOY_HASH = "1a09182c4e3f72ff475e571412fbb0f9b08d14296e8b5707d325f42ef94d98f4"
WITHOUT_EFFECT = (
    "seed=3",
    "device=cpu",
    "device_map=auto",
    "batch_tokens=7",
    "engine_memory_mb=1",
    "threads=2",
    "checkpoint_every=3",
    "strict=true",
    "out=x",
    "existing=rerun",
    "wandb.mode=offline",
    "wandb.project=p",
    "wandb.group=g",
)
OF_THE_MACHINE = ("out=x", "existing=rerun", "device=cpu", "device_map=auto", "threads=2", "batch_tokens=7",
                  "engine_memory_mb=1", "tuned=presets", "wandb.mode=offline", "wandb.group=g",
                  "hydra/launcher=ray")  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (TOY, TOY_HASH),
        ((*TOY, *WITHOUT_EFFECT), TOY_HASH),
        (("stream=atlas-qa", "editor=mend"), "4f7f9a5b7e078dc9e6b96800509ad9cea97b1912f6b63080e4574c9b087c52de"),
        (
            ("stream=zsre", "stream.path=x", "editor=grace", "stream.locality_target=unedited"),
            "dee3ef2a60b41573611cdd9fc1f5452e58e5bb95fe172bb6e62bc80c0cf2b233",
        ),
        (("paper=zsre", "editor=ft_ewc"), "73a7ff8da4ebae473984565874caa24a659f9f44e929c6345b76b4bc3f228da3"),
        (
            ("stream=atlas-text", "editor=rome", "editor.prefix_lengths=[3,4]", "editor.seed=4", "tuned=none"),
            "9cea2a503da8d193e222e72b358fdd6a2765ce538fb842b1fafdc881bd9c58f9",
        ),
        (
            ("stream=atlas-drift", "editor=ft", "layer=a.b", "dtype=bfloat16", "split=validation", "max_edits=3",
             "eval_every=2", "max_upstream=null", "batch_size=8", "engine=plain", "tuning_budget=mine",
             "protocol.query=last_token", "protocol.prefix_length=3", "model=nobody/nothing"),
            "3e0faaf1e36adb1ab11bd0fd5523a705f308e7db8e5107d58f40aa2a98dc395f",
        ),
    ],
)  # fmt: skip
def test_a_configuration_keeps_the_hash_by_which_its_run_folder_is_found(
    overrides: Sequence[str], expected: str
) -> None:
    config = compose(overrides)
    assert hash_config(config.plain()) == expected
    assert config.digits == expected[:8]


@pytest.mark.parametrize("given", ["order=stream", "order=shuffle", "protocol.normalise=squad"])
def test_an_order_or_a_normalisation_that_is_named_has_a_run_folder_of_its_own(given: str) -> None:
    assert hash_config(compose([*TOY, given]).plain()) != TOY_HASH


def test_a_younger_option_of_a_stream_tells_folders_apart_once_it_differs_from_its_default() -> None:
    given = ("stream=zsre", "stream.path=x", "editor=grace")
    hashes = {
        hash_config(compose((*given, option)).plain())
        for option in ("stream.task=qa", "stream.task=completion", "stream.target=answers", "stream.max_new_tokens=21")
    }
    assert len(hashes) == 4


def test_a_sweep_keeps_the_name_that_groups_its_runs() -> None:
    given = ("stream=toy", "editor=none,ft", "seed=0,1")
    assert sweep_name(None, given) == sweep_name(None, (*given, *OF_THE_MACHINE)) == "sweep-ec348d55"
    told_apart = ("checkpoint_every=3", "strict=true", "tuning_budget=x", "protocol.query=prefix")
    assert sweep_name("tune", ("stream=toy", *told_apart)) == "tune-5a60ed87"


CONFIG_FILE = """\
model: null
layer: null
dtype: float32
device: auto
device_map: null
load_in: null
seed: 0
split: edits
order: null
edit: errors
edits_at_once: 1
max_edits: null
eval_every: 50
score_after: target
scores: null
max_upstream: 500
batch_size: 64
batch_tokens: 16384
engine: exact
engine_memory_mb: null
threads: auto
checkpoint_every: 50
strict: false
tuning_budget: 6 validation runs
chat:
  enabled: false
  system: null
target_space: auto
protocol:
  query: prefix
  prefix_length: 8
  normalise: null
  main_score: null
  locality_score: null
  stop: newline
  special_tokens: text
capability:
  tasks: null
  every: null
  limit: null
  include_path: null
out: runs
existing: reuse
wandb:
  mode: auto
  project: grace-bench
  group: '1'
stream:
  _target_: grace_bench.streams.toy.Toy
  _partial_: false
editor:
  _target_: grace_bench.editors.grace.Grace
  _partial_: true
  eps_init: 0.5
  n_iter: 100
  lr: 1.0e-05
  value_init: cold
  replacement: replace_last
  distance: euclidean
  fidelity: strict
  overlap: allow
  seed: 0
"""


def test_the_file_in_a_run_folder_holds_every_option_in_this_order_and_is_read_back(tmp_path: Path) -> None:
    config = compose([*TOY, "wandb.group='1'", "editor.lr=1e-5", "tuning_budget=6 validation runs"])
    write_config(config, tmp_path / "config.yaml")
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == CONFIG_FILE
    assert RunConfig.from_plain(read_plain_config(tmp_path / "config.yaml")) == config


def test_every_setting_of_a_run_is_an_option_with_the_same_default() -> None:
    options = {setting_name(name): value for name, value in compose([*TOY, "tuned=none"]).options()}
    settings = {field.name: getattr(RunSettings(), field.name) for field in fields(RunSettings)}
    settings |= vars(settings.pop("schedule"))
    assert settings.pop("capability") is options["capability_tasks"] is None
    assert {name: options[name] for name in settings} == settings


def test_settings_take_the_values_of_the_options() -> None:
    given = compose(
        [
            *(*TOY, "seed=5", "max_edits=7", "max_upstream=null", "protocol.prefix_length=3", "engine=plain"),
            *("capability.tasks=[blimp,piqa]", "capability.every=5", "capability.limit=9"),
        ]
    )
    assert run_settings(given) == RunSettings(
        seed=5,
        schedule=Schedule(max_edits=7, max_upstream=None),
        prefix_length=3,
        engine="plain",
        tuning_budget=given.tuning_budget,
        capability=CapabilitySettings(tasks=["blimp", "piqa"], every=5, limit=9),
    )


@pytest.mark.parametrize(
    ("typed", "chat", "system"),
    [
        (["chat=true"], True, None),
        (["chat=true", "chat.system=You are brief."], True, "You are brief."),
        (["chat={enabled: true, system: Hi}"], True, "Hi"),
        (["chat=false"], False, None),
        ([], False, None),
    ],
)
def test_a_chat_is_asked_for_in_one_word(typed: list[str], chat: bool, system: str | None) -> None:
    settings = run_settings(compose([*TOY, *typed]))
    assert (settings.chat, settings.chat_system) == (chat, system)
    assert settings.text_format == TextFormat(chat=chat, system=system)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["chat=maybe"], "chat=maybe should be true or false"),
        (["chat.system=Hi"], "chat.system=Hi needs chat=true"),
        (["target_space=sometimes"], "target_space=sometimes is not known"),
        (["protocol.special_tokens=pars"], "did you mean 'parse'?"),
    ],
)
def test_a_format_that_texts_cannot_have_is_named(typed: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        compose([*TOY, *typed])
    assert says in str(caught.value)


@pytest.mark.parametrize("typed", ["chat=true", "target_space=never", "protocol.special_tokens=parse"])
def test_only_another_format_than_the_default_changes_the_hash(typed: str) -> None:
    plain = compose(TOY).plain()
    older = {name: value for name, value in plain.items() if name not in ("chat", "target_space")}
    older["protocol"] = {name: value for name, value in plain["protocol"].items() if name != "special_tokens"}
    assert hash_config(older) == hash_config(plain)
    assert RunConfig.from_plain(older).plain() == plain
    assert hash_config(compose([*TOY, typed]).plain()) != hash_config(plain)


def test_help_shows_every_option_with_its_default_and_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if re.match(r"  [a-z_.]+=\S+  ", line)]
    assert [line.split("=")[0].strip() for line in lines] == list(OPTIONS)
    for name, option in OPTIONS.items():
        assert option.help in shown
        value: Any = default_options()
        for part in name.split("."):
            value = value[part]
        assert f"  {name}={'null' if value is None else yaml.safe_dump(value).split()[0]} " in shown


def test_a_configuration_cannot_be_changed() -> None:
    config = compose(TOY)
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        config.wandb.mode = "online"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sedd": 1}, "there is no option sedd"),
        ({"wandb": {"mode": "auto", "color": 1}}, "there is no option wandb.color"),
        ({"seed": -1}, "seed=-1 should be a whole number, at least 0"),
        ({"strict": "yes"}, "strict=yes should be true or false"),
        ({"max_edits": 1.5}, "max_edits=1.5 should be a whole number, at least 1"),
        ({"threads": True}, "threads=True should be a whole number, at least 1"),
        ({"engine": "exect"}, "engine=exect is not known; did you mean 'exact'?"),
        ({"order": "steam"}, "order=steam is not known; did you mean 'stream'? (there are: shuffle, stream)"),
        (
            {"protocol": {"query": "prefix", "prefix_length": 8, "normalise": "stric"}},
            "protocol.normalise=stric is not known; did you mean 'strict'? (there are: squad, strict)",
        ),
        ({"protocol": 3}, "protocol=3 should be options"),
        ({"stream": "toy"}, "stream=toy should be the settings of a stream"),
        ({"editor": {"_target_": "os.remove"}}, "editor._target_=os.remove is no registered editor"),
    ],
)
def test_a_wrong_value_in_a_recorded_configuration_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.from_plain(compose(TOY).plain() | change)
    assert says in str(caught.value)


def test_a_setting_that_the_editor_lacks_is_named() -> None:
    plain = compose(TOY).plain()
    plain["editor"]["epsilon"] = 1.0
    with pytest.raises(UserError, match=r"editor 'grace' has no option editor.epsilon"):
        make_editor(RunConfig.from_plain(plain))


def test_a_recorded_configuration_may_lack_only_options_that_change_no_answer_or_are_younger() -> None:
    config = compose(TOY)
    for name in OPTIONS:
        plain = config.plain()
        group, _, option = name.rpartition(".")
        del (plain[group] if group else plain)[option]
        if OPTIONS[name].in_hash and OPTIONS[name].default_in_hash:
            with pytest.raises(UserError, match=f"field '{name}': is missing"):
                RunConfig.from_plain(plain)
        else:
            assert RunConfig.from_plain(plain) == config


def test_an_option_is_written_down_nowhere_but_where_it_is_declared() -> None:
    """The name of an option that only the declaration knows, such as `engine_memory_mb`, stands in no other module."""
    import grace_bench.launch

    folder = Path(inspect.getfile(grace_bench.launch)).parent
    holding = [path.name for path in folder.rglob("*.*") if path.suffix in (".py", ".yaml")
               and "engine_memory_mb" in path.read_text(encoding="utf-8")]  # fmt: skip
    assert holding == ["run_config.py"]
