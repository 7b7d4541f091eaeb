"""YAML configuration files whose quoted strings stay strings.

jsonargparse parses each string of a configuration file a second time, for the type of its field.
The text ``"---"`` of an optional field would become None, and ``"1"`` in a dict a number. A parser
with the mode of ``text_mode`` marks strings where text is allowed and does not parse them again. On
the command line, ``null`` still means None.
"""

import re
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from typing import Any, Union, get_args, get_origin, get_type_hints

_FLOAT = "tag:yaml.org,2002:float"
# floats of YAML 1.2; PyYAML's YAML 1.1 floats must have a point and a signed exponent
_EXPONENT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+")


class YamlText(str):
    """A string read from YAML; jsonargparse parses only plain ``str`` values again."""


def text_mode(
    kind: Callable[..., Any],
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> str:
    """A ``parser_mode`` of jsonargparse for the arguments of a function or a dataclass.

    ``upgrade`` converts the values of a whole file into those of the arguments.
    """
    import yaml
    from jsonargparse import set_dumper, set_loader
    from jsonargparse.typing import register_type

    # lets --print_config write it into fields of type Any; the dumper writes a plain string
    register_type(YamlText, lambda text: text, YamlText, fail_already_registered=False)
    hints = get_type_hints(kind)

    def load(text: str) -> Any:
        value = load_yaml(text)
        if value is None:
            return text  # "---" or a comment
        if upgrade is not None and isinstance(value, dict):
            value = upgrade(value)
        if isinstance(value, dict) and value.keys() <= hints.keys():
            return {name: _mark(hints[name], item) for name, item in value.items()}
        return _map_text(value, YamlText)  # the value of one option

    mode = f"yaml text of {kind.__qualname__}"
    set_loader(mode, load, exceptions=(yaml.YAMLError,))
    set_dumper(mode, dump_yaml)
    return mode


def load_yaml(text: str) -> Any:
    """The value of a YAML text; 3e-4 is a number, as in YAML 1.2, and a date is text."""
    import yaml

    return yaml.load(text, Loader=_loader())


def dump_yaml(values: Any) -> str:
    """Plain values as YAML that ``load_yaml`` reads back unchanged."""
    import yaml

    return yaml.dump(plain_text(values), Dumper=_dumper(), sort_keys=False)


def plain_text(value: Any) -> Any:
    """The same value with plain strings in place of ``YamlText``, dataclasses included."""
    return _map_text(value, str)


def _mark(hint: Any, value: Any) -> Any:
    """The value with strings as ``YamlText`` wherever the type hint allows text."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        wanted = dict if isinstance(value, dict) else type(value)
        fitting = [arg for arg in args if wanted in (get_origin(arg), arg) or is_dataclass(arg)]
        return _mark(fitting[0], value) if fitting else value
    if origin in (str, Any):
        return _map_text(value, YamlText)
    if isinstance(value, dict) and is_dataclass(hint):
        hints = get_type_hints(hint)
        return {name: _mark(hints.get(name), item) for name, item in value.items()}
    if isinstance(value, dict) and origin is dict and args:
        return {key: _mark(args[1], item) for key, item in value.items()}
    if isinstance(value, list) and origin in (list, tuple) and args:
        return [_mark(args[0], item) for item in value]
    return value


def _map_text(value: Any, kind: type[str]) -> Any:
    """The value with every string converted to ``kind``, except dict keys."""
    if isinstance(value, str):
        return kind(value)
    if isinstance(value, dict):
        return {plain_text(key): _map_text(item, kind) for key, item in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_map_text(item, kind) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        named = {part.name: getattr(value, part.name) for part in fields(value) if part.init}
        return replace(value, **{name: _map_text(item, kind) for name, item in named.items()})
    return value


@lru_cache(maxsize=1)
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads numbers as in YAML 1.2, and no dates."""

    _use_numbers(Loader)
    return Loader


@lru_cache(maxsize=1)
def _dumper() -> Any:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes strings that the loader would not read as strings."""

        def ignore_aliases(self, data: Any) -> bool:
            return True  # no YAML aliases: a value that occurs twice is written twice

    _use_numbers(Dumper)
    return Dumper


def _use_numbers(kind: Any) -> None:
    """Make a loader or dumper accept floats such as 3e-4 and 1.0e5, and no dates."""
    kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
        for first, known in kind.yaml_implicit_resolvers.items()
    }
    kind.add_implicit_resolver(
        _FLOAT, re.compile(f"^(?:{_EXPONENT.pattern})$"), list("-+.0123456789")
    )
