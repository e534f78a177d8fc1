"""Settings as YAML: read with every key known and every value of its type, written with all of them."""

import difflib
import re
import types
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml  # type: ignore[import-untyped]

S = TypeVar("S")


def read_yaml(path: Path) -> dict[str, Any]:
    """A config file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, a key twice, or no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config file must be one that exists, got {str(path)!r}; check the path.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"config file must be YAML, got {str(path)!r} ({' '.join(str(error).split())}); mend it."
        ) from error
    if content is not None and not isinstance(content, dict):
        raise ValueError(
            f"config file must be a mapping of names to values, got {type(content).__name__}; mend {path}."
        )
    return content or {}


def write_yaml(settings: Any) -> str:
    """A dataclass as YAML, every field of it."""
    return str(yaml.safe_dump(plain(asdict(settings)), sort_keys=False, allow_unicode=True, width=120))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over`, mappings key by key: {a: {b: 1}} and {a: {c: 2}} give {a: {b: 1, c: 2}}."""
    both = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = merged(both[key], value) if nested else value
    return both


def read_as(kind: type[S], content: Any, where: str) -> S:
    """A dataclass from a mapping; `where` stands in front of the keys in errors: "data.".

    Raises:
        ValueError: an unknown key.
        TypeError: a value of another type.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"{where.rstrip('.')} must be a mapping, got {content!r:.60}; write it as {{name: value}}.")
    hints = typing.get_type_hints(kind)
    refuse_unknown(content, hints, where)
    return kind(**{name: value_as(hints[name], value, where + name) for name, value in content.items()})


def value_as(hint: Any, value: Any, name: str) -> Any:
    """A value of the hinted type; lists of dataclasses become tuples of them.

    Raises:
        ValueError: none of a Literal's.
        TypeError: of another type.
    """
    if is_dataclass(hint) and isinstance(hint, type):
        return read_as(hint, value, f"{name}.")
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise TypeError(f"{name} must be a list, got {value!r:.60}; write it as [{{…}}].")
        return tuple(value_as(typing.get_args(hint)[0], one, f"{name}[{index}]") for index, one in enumerate(value))
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(choice) or choice for choice in choices)
    if Literal in kinds:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}; pass one of them.")
        return value
    if float in kinds and type(value) is int:
        return float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        said = " or ".join("nothing" if one is types.NoneType else one.__name__ for one in kinds)
        raise TypeError(f"{name} must be {said}, got {value!r:.60}; mend the value.")
    return value


def refuse_unknown(content: Iterable[Any], known: Iterable[str], where: str) -> None:
    """Raise a ValueError for a key that is not known, with the one that is nearest."""
    names = list(known)
    for name in content:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}."
            raise ValueError(f"{where}{name} must be a known key, got one that is not; {advice}")


def plain(content: Any) -> Any:
    """Mappings and lists only, as YAML reads them back."""
    if isinstance(content, Mapping):
        return {str(key): plain(value) for key, value in content.items()}
    return [plain(value) for value in content] if isinstance(content, list | tuple) else content


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": [2]} as {"a.b": 1, "c[0]": 2}."""
    if isinstance(content, Mapping) and content:
        items: Iterable[tuple[str, Any]] = ((f"{prefix}.{k}" if prefix else str(k), v) for k, v in content.items())
    elif isinstance(content, list | tuple) and content:
        items = ((f"{prefix}[{index}]", value) for index, value in enumerate(content))
    else:
        return {} if isinstance(content, Mapping | list | tuple) else {prefix: content}
    return {key: value for name, part in items for key, value in flat(part, name).items()}


class _Loader(yaml.SafeLoader):
    """YAML in which 2e-5 is a number, as in YAML 1.2, and a key stands once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return typing.cast(dict[Hashable, Any], super().construct_mapping(node, deep))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
