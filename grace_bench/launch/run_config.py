"""The options of a run, each declared once, and the frozen configuration that they make.

Hydra's defaults, `run --help`, the checks, the hash in a run folder's name, the name of a sweep and what `check`
compares with a result are all derived from the fields below. To add an option, add a field; if the run needs the value,
add a field of the same name to `RunSettings` too.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, Literal, Self

from grace_bench.common.options import check_choice, check_flag, check_text, check_whole
from grace_bench.common.scores import STOPS, check_score, check_scores
from grace_bench.errors import UserError
from grace_bench.models.tokens import SPECIAL_TOKENS, TARGET_SPACES
from grace_bench.registry import EDITORS, STREAMS, Registry

_HASH_DIGITS = 8


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is declared of an option beside its name, type and default.

    Attributes:
        help: One line for `run --help`.
        check: Raises `UserError` for a value that the option cannot have, given the option's name and the value.
        in_hash: Whether the value may change an answer, and so tells run folders apart.
        default_in_hash: Whether the default is hashed too. False for an option that is younger than the hash, so that
            runs made before it keep their folders.
        in_sweep_name: Whether the value tells sweeps apart.
        in_protocol: Whether a result records the value in its `protocol`.
        setting: The name of the run's setting and of the protocol's field; empty for the last part of the option's.
    """

    help: str
    check: Callable[[str, Any], None]
    in_hash: bool = True
    default_in_hash: bool = True
    in_sweep_name: bool = True
    in_protocol: bool = False
    setting: str = ""


def _option(default: Any, help: str, check: Callable[[str, Any], None], **declared: Any) -> Any:
    return field(default=default, metadata={"option": Option(help=help, check=check, **declared)})


def _whole(least: int, *, unless: Any = ...) -> Callable[[str, Any], None]:
    """Checks for a whole number, or for the one value that stands for none."""

    def check(name: str, value: Any) -> None:
        if value is None if unless is None else value == unless:
            return
        check_whole(name, value, least=least)

    return check


def _one_of(*choices: str, optional: bool = False) -> Callable[[str, Any], None]:
    """Checks for one of the choices, or for null too."""

    def check(name: str, value: Any) -> None:
        if not (optional and value is None):
            check_choice(name, value, choices)

    return check


_text_or_null = partial(check_text, optional=True)


def _folder(name: str, value: Any) -> None:
    check_text(name, value)
    # A shell does not expand it after `=`, and a folder of this name invites a disastrous `rm`.
    if value.partition("/")[0] == "~":
        raise UserError(f"{name}={value} should be the whole path: ~ is not expanded here, $HOME is")


@dataclass(frozen=True, kw_only=True)
class ProtocolOptions:
    """The options under `protocol.`."""

    query: str = _option(
        "prefix",
        "where running text is queried: prefix, or last_token as in the official code",
        _one_of("prefix", "last_token"),
        in_protocol=True,
    )
    prefix_length: int = _option(8, "tokens of running text that are read but not scored", _whole(1), in_protocol=True)
    normalise: Literal["squad", "strict"] | None = _option(
        None,
        "how answers are compared: squad, or strict to tell numbers and symbols apart; null for the stream's own",
        _one_of("squad", "strict", optional=True),
        default_in_hash=False,
    )
    main_score: str | None = _option(
        None,
        "the score that ranks the results, one of the panel (docs/scores.md); null for the task's own",
        check_score,
        default_in_hash=False,
    )
    locality_score: str | None = _option(
        None,
        "the same for Locality, where it may be agreement or token_agreement; null for the main score",
        check_score,
        default_in_hash=False,
        in_protocol=True,
    )
    stop: str = _option(
        "newline",
        "where a free answer ends besides the end token: newline, or sentence for the first full stop too",
        _one_of(*STOPS),
        default_in_hash=False,
        in_protocol=True,
    )
    special_tokens: str = _option(
        "text",
        "names of special tokens in prompts and targets: text, or parse to read them as the tokens",
        _one_of(*SPECIAL_TOKENS),
        default_in_hash=False,
        in_protocol=True,
    )


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The options under `chat.`; `chat=true` is short for `chat.enabled=true`."""

    enabled: bool = _option(
        False,
        "put prompts through the tokenizer's chat template (qa and completion); chat=true for short",
        lambda _, value: check_flag("chat", value),
        default_in_hash=False,
        setting="chat",
    )
    system: str | None = _option(
        None,
        "the system message of a chat; null for none",
        _text_or_null,
        default_in_hash=False,
        in_protocol=True,
        setting="chat_system",
    )

    def __post_init__(self) -> None:
        if self.system is not None and self.enabled is False:
            raise UserError(f"chat.system={self.system} needs chat=true")


def _check_tasks(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise UserError(f"{name}={value} should be a list of lm-eval tasks, as [blimp,piqa]")
    for task in value:
        check_text(name, task)


@dataclass(frozen=True, kw_only=True)
class CapabilityOptions:
    """The options under `capability.`."""

    tasks: Sequence[str] | None = _option(
        None,
        "tasks of lm-evaluation-harness, measured before and at the end, as [blimp,piqa]; null for none",
        _check_tasks,
        default_in_hash=False,
        in_protocol=True,
        setting="capability_tasks",
    )
    every: int | None = _option(
        None,
        "measure them at the first evaluation after every so many edits too",
        _whole(1, unless=None),
        default_in_hash=False,
    )
    limit: int | None = _option(
        None,
        "use only so many documents of each task; null for all",
        _whole(1, unless=None),
        default_in_hash=False,
        in_protocol=True,
        setting="capability_limit",
    )
    include_path: str | None = _option(
        None,
        "a folder of task files of one's own",
        _text_or_null,
        in_hash=False,
        in_sweep_name=False,
    )

    def __post_init__(self) -> None:
        if self.tasks is None:
            for declared in fields(self):
                if getattr(self, declared.name) is not None:
                    raise UserError(f"capability.{declared.name}={getattr(self, declared.name)} needs capability.tasks")


@dataclass(frozen=True, kw_only=True)
class WandbOptions:
    """The options under `wandb.`."""

    mode: Literal["auto", "online", "offline", "disabled"] = _option(
        "auto",
        "auto (online if logged in, else offline), online, offline or disabled",
        _one_of("auto", "online", "offline", "disabled"),
        in_hash=False,
        in_sweep_name=False,
    )
    project: str = _option("grace-bench", "the W&B project", check_text, in_hash=False, in_sweep_name=False)
    group: str | None = _option(
        None,
        "the W&B group; null for stream and model, or sweep",
        _text_or_null,
        in_hash=False,
        in_sweep_name=False,
    )


@dataclass(frozen=True, kw_only=True)
class Component:
    """A registered stream or editor with the settings for its constructor.

    Attributes:
        name: The registered name.
        node: The component as a configuration file records it: the class under `_target_`, `_partial_`, and the
            settings.
    """

    name: str
    node: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: value for name, value in self.node.items() if not str(name).startswith("_")}

    @classmethod
    def from_node(cls, group: str, node: Any, registry: Registry[Any]) -> Self:
        """Reads a component from a configuration, which a stranger may have written.

        Args:
            group: `stream` or `editor`.
            node: What the configuration holds there.
            registry: The registry that the class must be in.

        Raises:
            UserError: If the class is not registered, or the settings hold what Hydra would act on.
        """
        if not isinstance(node, Mapping):
            raise UserError(f"{group}={node} should be the settings of a {group}")
        name = registry.name_of(node.get("_target_"))
        if name is None:
            raise UserError(f"{group}._target_={node.get('_target_')} is no registered {group}")
        # The editor is made later, on its model.
        if bool(node.get("_partial_", False)) != (registry is EDITORS):
            raise UserError(f"{group}._partial_={node.get('_partial_')}: is no setting")
        _refuse_directives(group, {key: value for key, value in node.items() if key not in ("_target_", "_partial_")})
        return cls(name=name, node=node)


_GROUPS = {
    "chat": ChatOptions,
    "protocol": ProtocolOptions,
    "capability": CapabilityOptions,
    "wandb": WandbOptions,
}
"""The classes of nested options."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a run: resolved, checked and frozen.

    Attributes:
        stream: The stream.
        editor: The editor.
    """

    model: str | None = _option(None, "a short name, a hub id or a folder; null for the stream's own", _text_or_null)
    layer: str | None = _option(None, "dotted path of the module to edit; null for the model's own", _text_or_null)
    dtype: str = _option("float32", "float32, bfloat16 or float16", check_text)
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, mps", check_text, in_hash=False, in_sweep_name=False)
    device_map: str | None = _option(
        None,
        "spreads the weights over devices instead: auto, balanced, ... (needs accelerate); null for one device",
        _text_or_null,
        in_hash=False,
        in_sweep_name=False,
    )
    load_in: Literal["8bit", "4bit"] | None = _option(
        None,
        "quantise the weights while loading: 8bit or 4bit (needs bitsandbytes); null to take them as they are",
        _one_of("8bit", "4bit", optional=True),
        default_in_hash=False,
    )
    seed: int = _option(0, "shuffles the edits and seeds every random generator", _whole(0), in_hash=False)
    split: str = _option("edits", "edits, or validation for tuning", _one_of("edits", "validation"), in_protocol=True)
    order: Literal["shuffle", "stream"] | None = _option(
        None,
        "shuffle the edits by seed, or take them in the order of the stream; null for the stream's own",
        _one_of("shuffle", "stream", optional=True),
        default_in_hash=False,
    )
    edit: Literal["errors", "all"] = _option(
        "errors",
        "edit the requests that the model, as edited so far, gets wrong, or all",
        _one_of("errors", "all"),
        default_in_hash=False,
        in_protocol=True,
    )
    edits_at_once: int = _option(
        1,
        "judge so many requests before one is edited; editors of batches edit them together",
        _whole(1),
        default_in_hash=False,
        in_protocol=True,
    )
    max_edits: int | None = _option(
        None,
        "stop at exactly this many edits; null for the whole stream",
        _whole(1, unless=None),
        in_protocol=True,
    )
    eval_every: int | str = _option(
        50,
        "evaluate after every so many edits; step for after every time step of the stream",
        _whole(1, unless="step"),
        in_protocol=True,
    )
    score_after: Literal["target", "all"] = _option(
        "target",
        "what is scored right after each edit: its target, or all for its rephrasings and probes too",
        _one_of("target", "all"),
        default_in_hash=False,
        in_protocol=True,
    )
    scores: Sequence[str] | None = _option(
        None,
        "the scores of the panel to compute, as [exact_match,contains]; null for all but fluency",
        check_scores,
        default_in_hash=False,
    )
    max_upstream: int | None = _option(
        500, "score at most so many upstream requests; null for all", _whole(1, unless=None), in_protocol=True
    )
    batch_size: int = _option(64, "score at most so many inputs in one forward pass", _whole(1))
    batch_tokens: int = _option(
        16384,
        "and at most so many tokens with padding, a longer text alone; on a CPU 1,024 unless it generates",
        _whole(1),
        in_hash=False,
        in_sweep_name=False,
    )
    engine: str = _option(
        "exact",
        "exact, or plain: every pass whole, one input at a time, as in the official code",
        _one_of("exact", "plain"),
    )
    engine_memory_mb: int | None = _option(
        None,
        "memory for the cache between evaluations; null for a quarter of the free memory",
        _whole(0, unless=None),
        in_hash=False,
        in_sweep_name=False,
    )
    threads: int | str = _option(
        "auto",
        "torch threads; auto takes one for tiny models",
        _whole(1, unless="auto"),
        in_hash=False,
        in_sweep_name=False,
    )
    checkpoint_every: int = _option(
        50,
        "write a checkpoint to resume from after every so many edits; the result is the same",
        _whole(1),
        in_hash=False,
    )
    strict: bool = _option(
        False, "stop at the first edit that fails instead of recording it and going on", check_flag, in_hash=False
    )
    tuning_budget: str | None = _option(
        None, "how the hyperparameters were chosen, as the leaderboard shows it", _text_or_null, in_protocol=True
    )
    chat: ChatOptions = field(default_factory=ChatOptions)
    target_space: str = _option(
        "auto",
        "a space between a prompt and its target: auto, always or never",
        _one_of(*TARGET_SPACES),
        default_in_hash=False,
        in_protocol=True,
    )
    protocol: ProtocolOptions = field(default_factory=ProtocolOptions)
    capability: CapabilityOptions = field(default_factory=CapabilityOptions)
    out: str = _option("runs", "where run folders are made", _folder, in_hash=False, in_sweep_name=False)
    existing: str = _option(
        "reuse",
        "a run folder that exists: reuse, resume what is not finished, or rerun to set the old one aside",
        _one_of("reuse", "resume", "rerun"),
        in_hash=False,
        in_sweep_name=False,
    )
    wandb: WandbOptions = field(default_factory=WandbOptions)
    stream: Component
    editor: Component

    def __post_init__(self) -> None:
        values = dict(self.options())
        for name, option in OPTIONS.items():
            option.check(name, values[name])

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Makes a configuration of plain, resolved values, as a run folder's `config.yaml` holds them.

        An option that does not change answers, or is younger than the hash, may be missing from a file that an earlier
        version wrote; the default then applies.

        Raises:
            UserError: If an option is unknown or missing, has a value that it cannot have, or the stream or editor is
                not registered.
        """
        given = dict(plain)
        components = {
            group: Component.from_node(group, given.pop(group, None), registry)
            for group, registry in (("stream", STREAMS), ("editor", EDITORS))
        }
        groups = {name: _group_from(name, kind, given.pop(name, {})) for name, kind in _GROUPS.items()}
        return _from_values(cls, "", given, **groups, **components)

    def options(self) -> Iterator[tuple[str, Any]]:
        """Yields every option with its value, by the name that is typed (`protocol.query`); not stream and editor."""
        for name in OPTIONS:
            value: Any = self
            for part in name.split("."):
                value = getattr(value, part)
            yield name, value

    def plain(self) -> dict[str, Any]:
        """Returns the configuration as plain values, in the order in which `config.yaml` holds them."""
        plain = _nested(self.options())
        return {**plain, "stream": dict(self.stream.node), "editor": dict(self.editor.node)}

    def flat(self) -> list[str]:
        """Returns every setting as `option=value`, those of stream and editor included."""
        return list(_leaves("", self.plain()))

    @property
    def digits(self) -> str:
        """The hex digits of the configuration's hash that stand in the name of a run folder."""
        return hash_config(self.plain())[:_HASH_DIGITS]


def _declared(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, Option]]:
    """Yields the name, default and declaration of every option of a class of options."""
    for declared in fields(kind):
        if "option" in declared.metadata:
            yield f"{prefix}{declared.name}", declared.default, declared.metadata["option"]
        elif is_dataclass(declared.type) and declared.type is not Component:
            yield from _declared(declared.type, f"{declared.name}.")  # type: ignore[arg-type]


OPTIONS: dict[str, Option] = {name: option for name, _, option in _declared(RunConfig)}
"""Every option of a run by the name that is typed, in the order of `config.yaml`."""
SHORT = {"chat": "chat.enabled"}
"""Options that may be typed by a shorter name."""
YOUNG_DEFAULTS = {name: default for name, default, option in _declared(RunConfig) if not option.default_in_hash}
"""The defaults of the options that are younger than the hash."""


def default_options() -> dict[str, Any]:
    """Returns the defaults of all options, nested as Hydra composes them."""
    return _nested((name, default) for name, default, _ in _declared(RunConfig))


def setting_name(name: str) -> str:
    """Returns the name of the run's setting and of the protocol's field for an option.

    >>> setting_name("protocol.query"), setting_name("chat.enabled")
    ('query', 'chat')
    """
    return OPTIONS[name].setting or name.rpartition(".")[2]


def option_lines() -> list[str]:
    """Returns a line of `run --help` for every option: the option with its default, and what it does."""
    shown = [(f"{name}={_typed(default)}", option.help) for name, default, option in _declared(RunConfig)]
    width = max(len(option) for option, _ in shown)
    return [f"{option:<{width}}  {text}" for option, text in shown]


def hash_config(plain: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a resolved configuration, without the options that do not change answers.

    It is the same for all seeds: an editor's seed that equals the run's seed does not count.

    Args:
        plain: The configuration, as `RunConfig.plain` returns it or a run folder's `config.yaml` holds it.
    """
    hashed = {name.partition(".")[0] for name, option in OPTIONS.items() if option.in_hash}
    left_out = {name.partition(".")[0] for name in OPTIONS} - hashed
    counted = {key: value for key, value in _hashed_part(plain).items() if key not in left_out}
    editor = counted.get("editor")
    if isinstance(editor, Mapping) and "seed" in editor:
        own = editor["seed"] != plain.get("seed")
        counted["editor"] = {**editor, "seed": [editor["seed"]] if own else 0}
    for kind, registry in (("stream", STREAMS), ("editor", EDITORS)):
        if kind in counted:
            counted[kind] = _without_younger_options(counted[kind], registry)
    return hashlib.sha256(json.dumps(counted, sort_keys=True, default=str).encode()).hexdigest()


def _without_younger_options(node: Any, registry: Registry[Any]) -> Any:
    """The settings of a stream or editor without its younger options that have their default."""
    name = registry.name_of(node.get("_target_")) if isinstance(node, Mapping) else None
    younger = () if name is None else registry.attribute(name, "younger_options")
    if name is None or not younger:
        return node
    parameters = inspect.signature(registry.get(name)).parameters
    defaults = {option: parameters[option].default for option in younger if option in parameters}
    # A composed configuration has lists where a constructor has tuples.
    plain = {option: list(value) if isinstance(value, tuple) else value for option, value in defaults.items()}
    return {key: value for key, value in node.items() if key not in plain or value != plain[key]}


def _hashed_part(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration without younger options that have their default and nested options that are not hashed."""
    kept = {}
    for key, value in plain.items():
        name = f"{prefix}{key}"
        if name in YOUNG_DEFAULTS and value == YOUNG_DEFAULTS[name]:
            continue
        if prefix and name in OPTIONS and not OPTIONS[name].in_hash:
            continue
        if any(young.startswith(f"{name}.") for young in YOUNG_DEFAULTS):
            value = _hashed_part(value, f"{name}.")
            if not value:
                continue
        kept[key] = value
    return kept


def make_stream(config: RunConfig) -> Any:
    """Returns the stream that a configuration describes.

    Raises:
        UserError: If an option has a value that it cannot have.
    """
    return _constructor("stream", config.stream, STREAMS)()


def make_editor(config: RunConfig) -> Callable[..., Any]:
    """Returns the constructor of the editor that a configuration describes; it takes `model=` and what a run adds.

    Raises:
        UserError: If the editor has no such option.
    """
    return _constructor("editor", config.editor, EDITORS)


def _constructor(group: str, component: Component, registry: Registry[Any]) -> Callable[..., Any]:
    cls: Callable[..., Any] = registry.get(component.name)
    parameters = inspect.signature(cls).parameters
    unknown = next((name for name in component.settings if name not in parameters), None)
    if unknown is not None:
        raise UserError(f"{group} {component.name!r} has no option {group}.{unknown}")
    return partial(cls, **component.settings)


def _group_from(group: str, kind: type, given: Any) -> Any:
    if not isinstance(given, Mapping):
        raise UserError(f"{group}={given} should be options")
    return _from_values(kind, f"{group}.", dict(given))


def _from_values(kind: Any, prefix: str, given: dict[str, Any], **others: Any) -> Any:
    known = {declared.name: declared for declared in fields(kind) if "option" in declared.metadata}
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise UserError(f"there is no option {prefix}{unknown}")
    declared = {name: field.metadata["option"] for name, field in known.items()}
    required = (name for name, option in declared.items() if option.in_hash and option.default_in_hash)
    missing = next((name for name in required if name not in given), None)
    if missing is not None:
        raise UserError(f"field '{prefix}{missing}': is missing")
    return kind(**given, **others)


def _nested(values: Any) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in values:
        group, _, option = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[option] = value
    return nested


def _leaves(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(path, inner)
    else:
        yield f"{path}={'null' if value is None else value}"


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _refuse_directives(place: str, value: Any) -> None:
    """Raises if settings hold, at any depth, a key that Hydra would act on; each of those begins with `_`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if str(key).startswith("_"):
                raise UserError(f"{place}.{key}: is no setting")
            _refuse_directives(f"{place}.{key}", inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_directives(place, inner)
