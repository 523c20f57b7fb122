"""Settings of a command: a dataclass, read from a YAML recipe and flags by jsonargparse.

```python
@dataclass(kw_only=True)
class Settings:
    \"""What the group is called in `--help`.\"""

    data_dir: str = setting("folder of the clips")
    learning_rate: float = setting("peak learning rate", 5e-5)
    model_config: dict[str, Any] = setting("fields of SSLAMConfig to change", {})

settings = parse_settings(Settings, ["--config", "recipe.yaml", "--learning_rate", "1e-3", "--model_config.hidden_size", "128"])
write_settings(settings, "runs/first/settings.yaml")
```
"""

import copy
import inspect
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_dumper, set_loader

from .errors import UserError, as_user_error
from .files import write_text
from .names import closest, did_you_mean, similar


Settings = TypeVar("Settings")
RECIPES = Path(__file__).parent / "recipes"
PATHS = {"data_dir", "output_dir", "output", "model", "cache_dir"}  # settings of several commands


def setting(help: str, default: Any = MISSING) -> Any:
    """A field of a settings dataclass with its help text. Without a default it must be given; a mutable default is copied."""
    if default is MISSING:
        return field(metadata={"help": help})
    return field(default_factory=lambda: copy.deepcopy(default), metadata={"help": help})


def parse_settings(cls: type[Settings], arguments: Sequence[str], *, prog: str = "sslam", description: str = "") -> Settings:
    """Settings from the words of a command line: flags override the YAML files of `--config`, which override the defaults.

    Beside what jsonargparse reads, `--bf16` and `--no_bf16` set a switch, `--test_folds 1 2` gives a list, and hyphens in names equal
    underscores, as in Transformers' own programs.

    Args:
        cls: the dataclass. `--help` has a group for it, for each class that it inherits from, and for each dataclass among its fields.
        arguments: the words behind the command's name.
        prog: name of the command, for its usage line.
        description: what the command does.

    Raises:
        UserError: (a `ValueError`) if a recipe cannot be read, or a setting is unknown, missing, or of another type.
        SystemExit: after `--help` or `--print_config`.
    """
    parser = _build_parser(cls, prog, description)
    with as_user_error("settings"):
        try:
            namespace = parser.parse_args(_plain_words(cls, arguments))
            _check_given(cls, namespace)
            values = parser.instantiate(namespace).as_dict()
        except (ArgumentError, TypeError, ValueError) as error:
            raise UserError(_explain(str(error), {name: kind for name, kind, _ in _kinds(cls)})) from error
        del values["config"]
        return cls(**values)


def _check_given(cls: type, values: Any) -> None:
    """Reject null where a setting has no such value, which jsonargparse accepts everywhere, `.nan` and `.inf`, floats to YAML, and a path
    without a name: an unset variable of the shell would stand for the current folder. Expand `~/`, which no shell does in a file, nor
    every one behind `--name=`."""
    for name, kind, _ in _kinds(cls):
        group, _, _ = name.rpartition(".")
        value = values.get(name, MISSING)
        if value is None and kind is not Any and NoneType not in (kind, *get_args(kind)) and values.get(group, True) is not None:
            raise UserError(_unexpected(name, "null", kind) + ": give one, or leave it out")
        if not _is_finite(value):
            raise UserError(f"{name} is {value}, but numbers must be finite: give another, or leave it out")
        if isinstance(value, str | list):
            values[name] = _expand_home(value)
        if value == "" and name in PATHS:
            raise UserError(f"{name} is empty, but a path is expected{'' if name == 'output' else ': write . for the current folder'}")


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, list) else not isinstance(value, float) or math.isfinite(value)


def _expand_home(value: Any) -> Any:
    if isinstance(value, list):
        return [_expand_home(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def read_settings(cls: type[Settings], file: str | Path | None = None, changes: Mapping[str, Any] | None = None) -> Settings:
    """Settings from a YAML file and changes to it.

    Args:
        cls: the dataclass.
        file: a recipe by name or path, or what [`write_settings`] wrote.
        changes: values by name, which override it; a dictionary, or a dotted name, changes entries of a group or dictionary.

    Raises:
        UserError: as [`parse_settings`].
    """
    words = [] if file is None else [f"--config={file}"]
    pending = list((changes or {}).items())
    for name, value in pending:
        if isinstance(value, Mapping) and value:
            pending += [(f"{name}.{entry}", inner) for entry, inner in value.items()]
        else:
            words.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return parse_settings(cls, words)


def write_settings(settings: Any, file: str | Path) -> None:
    """All settings, defaults included, as YAML that [`read_settings`] reads back."""
    write_text(file, dump_yaml(settings_dict(settings)))


def settings_dict(settings: Any) -> dict[str, Any]:
    """Every setting by name, in types that JSON and YAML have."""

    def plain(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value.value if isinstance(value, Enum) else value for name, value in items}

    given = {f.name for f in fields(settings) if f.init}
    return {name: value for name, value in asdict(settings, dict_factory=plain).items() if name in given}


def find_recipe(name: str | Path) -> Path:
    """A recipe of this package, by its name with or without `.yaml`, or any other YAML file by its path.

    Raises:
        UserError: if there is none; it lists the recipes.
    """
    named, file = RECIPES / f"{Path(name).stem}.yaml", Path(name).expanduser()
    if file.is_file():
        return file
    if Path(name).name == str(name) and named.is_file():
        return named
    alike = did_you_mean(similar(Path(name).stem, recipe_names()))
    raise UserError(f"config is {str(name)!r}, but there is no such file or recipe: {alike}recipes are {', '.join(recipe_names())}")


def recipe_names() -> list[str]:
    """Names of the recipes in this package."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def check_names(names: Iterable[str], known: Iterable[str], prefix: str = "") -> None:
    """Reject names that are not known, and say which known ones come closest.

    Raises:
        UserError: naming the first unknown one.
    """
    known = list(known)
    for name in names:
        if name not in known:
            raise UserError(f"there is no setting {prefix}{name}: {closest(str(name), known, prefix)}")


def load_yaml(text: str) -> Any:
    """The content of a YAML text. A number such as `5e-5` is a float, a date is text.

    Raises:
        UserError: if it is not YAML, a key stands twice, or it has an alias, whose expansion can grow without bound.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"not YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"it has the alias *{event.anchor}: write the value out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [name for name, count in names.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 reads 5e-5 as text, for it has no point.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), first=list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):  # the same list twice would become an alias, which the loader rejects
        return True


def dump_yaml(values: Any) -> str:
    """YAML text that [`load_yaml`] reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _load(text: str) -> Any:
    """As [`load_yaml`], but a single sign, which may separate labels, is itself: `#` not an empty comment, `~` and `!` not null."""
    return text if text in ("~", "!") or (text.startswith("#") and "\n" not in text) else load_yaml(text)


set_loader("strict_yaml", _load, exceptions=(UserError,))
set_dumper("strict_yaml", dump_yaml)


def _build_parser(cls: type, prog: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description=description,
        usage=f"{prog} [--config RECIPE_OR_FILE] [--setting value ...]",
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode="strict_yaml",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of settings, or name of a recipe; flags override it")
    parser.add_class_arguments(cls)
    help_texts = {name: text.replace("%%", "%") for name, _, text in _kinds(cls)}  # as argparse wants it; jsonargparse does not
    help_texts["print_config"] = "print all settings as YAML, and exit"
    for action in parser._actions:
        action.help = help_texts.get(action.dest) or action.help
    _group_by_class(parser, cls)
    return parser


def _group_by_class(parser: ArgumentParser, cls: type) -> None:
    """Move each setting into a group named by the class that declares it: `--help` then shows who knows of what."""
    names = {f.name for f in fields(cls)}
    every = next(group for group in parser._action_groups if any(action.dest in names for action in group._group_actions))
    declared = {name: ancestor for ancestor in cls.__mro__[::-1] for name in inspect.get_annotations(ancestor)}
    for ancestor in cls.__mro__[:-1]:
        actions = [a for a in every._group_actions if declared.get(a.dest.split(".")[0]) is ancestor]
        if ancestor is cls:
            every.title = _title(cls)
        elif actions:
            parser.add_argument_group(_title(ancestor))._group_actions.extend(actions)
            every._group_actions[:] = [a for a in every._group_actions if a not in actions]


def _title(cls: type) -> str:
    """The first sentence of a class' docstring, or its name where it has none of its own or comes from another library."""
    library = cls.__module__.partition(".")[0]
    if library == "transformers":
        return f"{library}.{cls.__name__}"
    first = (cls.__doc__ or "").strip().split("\n")[0].rstrip(".")
    return cls.__name__ if first.startswith(cls.__name__ + "(") or not first or "`" in first else first


def _kinds(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Dotted name, annotation and help text of every field, those of groups included."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        if f.init:
            yield prefix + f.name, hints[f.name], f.metadata.get("help", "")
            for option in (hints[f.name], *get_args(hints[f.name])):
                if is_dataclass(option):
                    yield from _kinds(option, f"{prefix}{f.name}.")  # type: ignore[arg-type]


def _plain_words(cls: type, arguments: Sequence[str]) -> list[str]:
    """The words as jsonargparse takes them: `--config` first, so that flags override it, `--name value` with one value each."""
    kinds, recipes, flags = {name: kind for name, kind, _ in _kinds(cls)}, [], []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r} stands without a name: write {_as_flag(word, _required(cls))}")
        name, has_value, value = word[2:].partition("=")
        name = name.replace("-", "_")
        values = [value] if has_value else []
        while words and not has_value and not words[0].startswith("--"):
            values.append(words.pop(0))
        if name in ("help", "print_config"):
            flags.append(word)
        elif name == "config":
            if not any(values):
                raise UserError("config has no value: write --config RECIPE_OR_FILE")
            recipes += [f"--config={_checked_recipe(value, kinds)}" for value in values]
        else:
            flags.append(_flag(name, values, kinds))
    return recipes + flags


def _checked_recipe(name: str, kinds: dict[str, Any]) -> Path:
    file = find_recipe(name)
    try:
        values = load_yaml(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(values or {}, dict):
        raise UserError(f"{file} holds {str(values)[:40]!r}, but lines of the form `name: value` are expected")
    for group, value in (values or {}).items():
        if is_dataclass(kinds.get(group)) and not isinstance(value, dict):
            found = "empty" if value is None else repr(value)[:40]
            raise UserError(f"{group} is {found} in {file}: write its settings below it, indented, or leave it out")
    return file


def _flag(name: str, values: list[str], kinds: dict[str, Any]) -> str:
    kind = kinds.get(name)
    options = {kind, *get_args(kind)}
    group, dot, last = name.rpartition(".")
    if not values and bool in options:
        return f"--{name}=true"
    if not values and last.startswith("no_") and kinds.get(positive := f"{group}{dot}{last[3:]}") is bool:
        return f"--{positive}=false"
    for listed in (option for option in options if get_origin(option) is list):
        if len(values) > 1 or (listed is kind and values and values[0][:1] != "["):
            (element,) = get_args(listed)
            # Text stays as it is: YAML would read the fold 010 as 8.
            return f"--{name}={json.dumps(values if str in (element, *get_args(element)) else [load_yaml(value) for value in values])}"
    if kind is None and name not in kinds and group not in kinds:  # also of several values, as of a misspelt list
        raise UserError(f"there is no setting {name}: {closest(name, kinds)}")
    if len(values) > 1:
        raise UserError(f"{name} has the values {' '.join(values)}, but takes one: put quotes around a value with spaces")
    if not values:
        raise UserError(f"{name} has no value: write --{name} VALUE" if kind else f"there is no setting {name}: {closest(name, kinds)}")
    return f"--{name}={values[0]}"


def _required(cls: type) -> list[str]:
    """Names of the settings without a default."""
    return [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]


def _as_flag(word: str, required: Sequence[str]) -> str:
    name, equals, value = word.partition("=")
    if equals:
        return f"--{name} {value}"
    needed = f" (required: {', '.join(f'--{name}' for name in required)})" if required else ""
    return f"--NAME {word}{needed}; a recipe is given as --config RECIPE"


def _explain(message: str, known: Mapping[str, Any]) -> str:
    """What jsonargparse found, in one sentence that says what to do."""
    message = " ".join(message.split())
    if match := re.match(r"Does not validate .*?Errors: - (.*?) - Expected a <class 'NoneType'>", message):  # of a group that may be null
        return match[1]
    if match := re.fullmatch(r'Parser key "[\w.]+": Unable to load config .*? - (Parser key .*)', message):
        return _explain(match[1], known)
    if match := re.fullmatch(r'Parser key "([\w.]+)": Unable to load config "(.*)"', message):
        return f"{match[1]} is {match[2]}, but its settings are expected: write --{match[1]}.NAME VALUE"
    if (match := re.fullmatch(r'Parser key "([\w.]+)": Expected a dot import path string: (.*)', message)) and match[1] in known:
        return _unexpected(match[1], match[2], known[match[1]])
    if match := re.search(r"unrecognized arguments: --([\w.]+)", message):
        return f"there is no setting {match[1]}: {closest(match[1], known)}"
    if match := re.search(r"(?:(?:Group|Parser key) [\"']([\w.]+).*)?[Oo]ption '(.+?)'(?: is not accepted|$)", message):
        name = f"{match[1]}.{match[2]}" if match[1] else match[2]
        return f"there is no setting {name}: {closest(name, known)}"
    if (match := re.fullmatch(r'Parser key "([\w.]+)": Does not validate .* Given value: (.*)', message)) and match[1] in known:
        name, value = match[1], match[2]
        if (nested := re.fullmatch(r"NestedArg\(key='(.+?)', val='?(.*?)'?\)", value)) and f"{name}.{nested[1]}" in known:
            name, value = f"{name}.{nested[1]}", nested[2]
        return _unexpected(name, value, known[name])
    if match := re.fullmatch(r'Parser key "([\w.]+)": Expected a (.+?)\. Got value: (.*)', message):
        if get_origin(known.get(match[1])) is Literal:
            return _unexpected(match[1], match[3], known[match[1]])
        kind = re.sub(r"<class '([\w.]+)'>|typing\.", lambda m: m[1] or "", match[2])
        if nested := re.match(r"NestedArg\(key='(.+?)'", match[3]):
            return f"there is no setting {match[1]}.{nested[1]}, for {match[1]} is {kind}"
        return f"{match[1]} is {match[3]}, but {kind} is expected"
    if match := re.fullmatch(r"the following arguments are required: (.*)", message):
        name = match[1].split(",")[0]
        return f"{name} is required: write --{name} VALUE, or give it in the recipe"
    return message


def _unexpected(name: str, value: str, kind: Any) -> str:
    """That a value is not of the annotated kind; of names that it may be, the closest one."""
    options = get_args(kind) if isinstance(kind, UnionType) or get_origin(kind) is Union else (kind,)
    values = [value for option in options if get_origin(option) is Literal for value in get_args(option)]
    expected = [f"one of {', '.join(map(repr, values))}"] if values else []
    for option in options:
        if get_origin(option) is not Literal:
            plain = option.__name__ if isinstance(option, type) and not get_args(option) else str(option).replace("typing.", "")
            expected.append("null" if option is NoneType else plain)
    alike = did_you_mean(similar(value, [one for one in values if isinstance(one, str)], 1)).strip()
    return f"{name} is {value}, but {' or '.join(expected)} is expected" + (alike and f": {alike}")
