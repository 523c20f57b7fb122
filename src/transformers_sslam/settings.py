"""Settings of a program: a dataclass, filled from a YAML file and `key=value` overrides, and checked against the types it declares.

```python
@dataclass
class Settings:
    data_dir: str = setting("folder of the clips")
    learning_rate: float = setting("peak learning rate", 5e-5)
    model: dict[str, Any] = setting("arguments of SSLAMConfig", {})

settings = parse_settings(Settings, "What the program does.")  # python program.py recipe.yaml learning_rate=1e-3 model.hidden_size=128
write_settings(settings, "runs/first/settings.yaml")
```
"""

import argparse
import copy
import difflib
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, asdict, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import UserError, as_user_error
from .files import write_text


Settings = TypeVar("Settings")
OVERRIDE = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)=(.*)", re.DOTALL)
LARGEST_DEPTH = 32  # of lists and groups within each other; recipes have three or four
TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


def setting(help: str, default: Any = MISSING) -> Any:
    """A field of a settings dataclass, with its explanation; without a default it must be given. Mutable defaults are copied."""
    if default is MISSING:
        return field(metadata={"help": help})
    return field(default_factory=lambda: copy.deepcopy(default), metadata={"help": help})


def parse_settings(cls: type[Settings], description: str, arguments: Sequence[str] | None = None) -> Settings:
    """Settings from a command line: at most one YAML file and any number of `key=value`; `--help` lists every setting.

    Args:
        cls: the dataclass.
        description: what the program does, for `--help`.
        arguments: by default those of this process.

    Raises:
        SystemExit: after `--help`, and, with a sentence on the error stream, if anything is wrong.
    """
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [RECIPE.yaml] [key=value ...]",
        epilog=f"settings:\n{list_settings(cls)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments).arguments
    overrides = [argument for argument in given if OVERRIDE.fullmatch(argument)]
    files = [argument for argument in given if argument not in overrides]
    try:
        if len(files) > 1:
            raise UserError(f"there are {len(files)} recipes ({', '.join(files)}), but one at most is read: give the others as key=value")
        return read_settings(cls, files[0] if files else None, overrides)
    except UserError as error:
        parser.error(str(error))


def read_settings(cls: type[Settings], file: str | Path | None = None, overrides: Iterable[str] = ()) -> Settings:
    """Settings from a YAML file, where there is one, and `key=value` overrides, which win over it.

    A dot in a key leads into a group (`augmentation.roll=false`) or a dictionary (`model_config.hidden_size=128`). A value is
    read as YAML reads it; where the setting is text, as it stands.

    Raises:
        UserError: (a `ValueError`) if the file cannot be read, a setting is unknown, missing or of another type.
    """
    values = {} if file is None else _read_yaml(Path(file))
    for override in overrides:
        match = OVERRIDE.fullmatch(override)
        if match is None:
            raise UserError(f"{override!r} is not a setting: write key=value")
        _assign(values, match[1].split("."), _Text(match[2]), match[1])
    return _build(cls, values, prefix="")


def write_settings(settings: Any, file: str | Path) -> None:
    """All settings, defaults included, as YAML that `read_settings` reads back."""

    class Plain(yaml.SafeDumper):  # the same list twice would become an alias, which the reader rejects
        def ignore_aliases(self, data):
            return True

    write_text(file, yaml.dump(asdict(settings), Dumper=Plain, sort_keys=False, allow_unicode=True))


def list_settings(cls: type, prefix: str = "") -> str:
    """Every setting with its default and explanation, one a line, groups by dots."""
    lines, hints = [], get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            lines.append(list_settings(hints[f.name], f"{prefix}{f.name}."))
            continue
        default = "(required)"
        if not _is_required(f):
            value = f.default if f.default_factory is MISSING else f.default_factory()
            default = "= " + yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
        explanation = f.metadata.get("help") or _documented(cls, f.name)
        lines.append(f"  {prefix}{f.name} {default}" + (f"\n      {explanation}" if explanation else ""))
    return "\n".join(lines)


def _documented(cls: type, name: str) -> str:
    """What the docstring of a class, or of one that it extends, says of an argument, on one line: for settings that a part of the library
    declares by itself."""
    documented = "\n\n".join(inspect.cleandoc(ancestor.__doc__ or "") for ancestor in cls.__mro__)
    found = re.search(rf"^    {name}: (.*(?:\n {{8}}.*)*)", documented, re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def check_names(names: Iterable[str], known: Iterable[str], prefix: str = "") -> None:
    """Refuse names that are not known, and say which known ones come closest.

    Raises:
        UserError: naming the first unknown one.
    """
    known = list(known)
    for name in names:
        if name not in known:
            closest = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
            advice = f"did you mean {' or '.join(prefix + c for c in closest)}?" if closest else f"there are {', '.join(known)}"
            raise UserError(f"there is no setting {prefix}{name}: {advice}")


class _Text(str):
    """A value from the command line, whose type only its setting can tell."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (`5e-5`, which YAML 1.1 takes for text), no key twice, and nothing that grows when it is read: no alias, which can
    refer to its own parent or double in size with each line, and no deep nesting."""

    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, f"it has the alias *{event.anchor}: write the value out", event.start_mark)
        if self.depth >= LARGEST_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"it is nested more than {LARGEST_DEPTH} deep", event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node, deep=False):
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [name for name, count in names.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


# Dates stay text: no setting is one, but a fold or a class of a data set may be called so.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), first=list("-+.0123456789"))


def load_yaml(text: str) -> Any:
    """What a text in YAML holds.

    Raises:
        UserError: if it is not YAML, or holds an alias, a key twice, or more than 32 levels.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"not YAML: {' '.join(str(error).split())}") from error


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file} is not there: give the path of a YAML file, or settings as key=value")
    try:
        values = load_yaml(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(values or {}, dict):
        raise UserError(f"{file} holds {TYPE_NAMES.get(type(values), 'a list')}, but lines of the form `key: value` are expected")
    return values or {}


def _assign(values: dict[str, Any], path: list[str], text: _Text, key: str) -> None:
    for name in path[:-1]:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise UserError(f"{key} cannot be set, because {name} is {values!r} and no group of settings")
    values[path[-1]] = text


def _build(cls: type[Settings], values: dict[str, Any], prefix: str) -> Settings:
    hints = get_type_hints(cls)
    check_names(values, hints, prefix)
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in values and _is_required(f):
            what = f" ({f.metadata['help']})" if "help" in f.metadata else ""
            where = "there" if "[" in prefix else f"in the recipe or as {prefix}{f.name}=..."  # within a list no key leads to it
            raise UserError(f"{prefix}{f.name} is required{what}: give it {where}")
    converted = {name: _convert(value, hints[name], prefix + name) for name, value in values.items()}
    group = prefix.rstrip(".")
    try:
        with as_user_error(group or "the settings"):
            return cls(**converted)
    except UserError as error:  # a group names its settings without itself
        if str(error).startswith(group):  # as anything starts with no group at all
            raise
        raise UserError(f"{group}: {error}") from error


def _is_required(f: Field) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _convert(value: Any, kind: Any, key: str) -> Any:
    """`value` as the annotation `kind` wants it, or an error that names `key`."""
    if isinstance(value, _Text):
        return _convert_text(value, kind, key)
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        return _build(kind, value, f"{key}.")  # type: ignore[arg-type]
    if (origin is dict or kind is Any) and isinstance(value, dict):
        return {name: _convert(item, arguments[1] if arguments else Any, f"{key}.{name}") for name, item in value.items()}
    if kind is Any or (origin is Literal and value in arguments):
        return value
    if origin is list and isinstance(value, list):
        return [_convert(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value)]
    if origin in (Union, UnionType):
        for option in arguments:
            try:
                return _convert(value, option, key)
            except UserError:
                continue
    if kind is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is kind:  # `type`, because True is an int too
        return value
    raise UserError(f"{key} is {value!r}, but {_type_name(kind)} is expected")


def _convert_text(text: _Text, kind: Any, key: str) -> Any:
    """As YAML where the setting takes what YAML finds; literally where that is text, or where only text fits."""
    literal = str(text)
    try:
        value = load_yaml(literal)
    except UserError:
        value = literal
    if value is None and literal.strip().lower() not in ("", "~", "null"):  # a comment, for YAML
        value = literal
    if literal.startswith("~/"):  # not every shell expands it behind a `key=`
        literal = value = str(Path(literal).expanduser())
    if literal != literal.strip() or (isinstance(value, str) and literal[:1] not in "\"'"):
        value = literal  # YAML would strip spaces, and read `|` as an empty block
    try:
        return _convert(value, kind, key)
    except UserError:
        try:
            return _convert(literal, kind, key)
        except UserError:
            pass
        raise


def _type_name(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, UnionType):
        return " or ".join(map(_type_name, arguments))
    if origin is list:
        return f"a list (each item {_type_name(arguments[0])})"
    return TYPE_NAMES.get(kind, "a group of settings")
