"""Templates: found by name or path, described by the parameter block at their start, and rendered.

A template is Jinja without logic. It starts with a comment that declares its parameters in YAML:

    {#- parameters
    model: {default: tiny, help: a model}
    -#}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from skyspot import __version__
from skyspot.errors import SkyspotError, UsageError, did_you_mean, shown
from skyspot.task import emitter

SUFFIX = ".yaml.j2"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's loader, if built, is ten times as fast.
_HEAD = re.compile(r"\A\{#-? parameters\n(.*?)-?#\}\n?", re.DOTALL)
_ORIGIN = re.compile(r"\A\{#-? ejected from .*?#\}\n", re.DOTALL)


@dataclass(frozen=True)
class Parameter:
    """One declared parameter."""

    name: str
    default: Any
    help: str


@dataclass(frozen=True)
class Template:
    """A template's text and its declarations."""

    name: str
    path: Path
    bundled: bool
    text: str
    parameters: tuple[Parameter, ...]
    about: str
    trainer: bool
    """True if `run` starts our trainer, which exits with 75 to be restarted."""


def bundled_folder() -> Path:
    """The folder of this release's templates: in the package, or in a checkout at the top."""
    package = Path(__file__).parents[1]
    inside = package / "templates"
    return inside if inside.is_dir() else package.parent / "templates"


def folders() -> list[tuple[Path, bool]]:
    """List the folders to search for templates, in order, and whether each is the bundled one."""
    found = [(Path("templates"), False)]
    with suppress(RuntimeError):  # There may be no home folder.
        found.append((Path.home() / ".config" / "skyspot" / "templates", False))
    return [*found, (bundled_folder(), True)]


def names() -> dict[str, Path]:
    """Map every template's name to its file."""
    found: dict[str, Path] = {}
    for folder, _ in folders():
        for path in sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []:
            found.setdefault(path.name.removesuffix(SUFFIX), path)
    return found


def find(name: str) -> Template:
    """Find a template by name or path.

    Raises:
        UsageError: there is none (names the nearest), or its parameters are unreadable.
    """
    if name.endswith(".j2") or "/" in name:
        path = Path(name)
    else:
        known = names()
        if name not in known:
            raise UsageError(
                f"no template {shown(name)}; available: {', '.join(sorted(known))}.{did_you_mean(name, known)}"
            )
        path = known[name]
    return read(path)


def read(path: Path) -> Template:
    """Read a template's file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8") from None
    body = _ORIGIN.sub("", text)
    head = _HEAD.match(body)
    if not head:
        raise UsageError(f"{path}: it must start with `{{#- parameters`, the block that declares its parameters")
    try:
        declared = yaml.load(head[1], Loader=_LOADER)
        about, trainer = str(declared.pop("about")), bool(declared.pop("trainer"))
        wrong = [key for key in declared if not str(key).isidentifier()]
        if wrong:
            raise UsageError(f"{path}: invalid parameter name {shown(str(wrong[0]))}; use only letters, digits and _")
        parameters = tuple(Parameter(key, value["default"], str(value["help"])) for key, value in declared.items())
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: its parameter block is unreadable: {' '.join(str(error).split())[:160]}") from None
    name = path.name.removesuffix(SUFFIX)
    bundled = path.parent.resolve() == bundled_folder().resolve()
    return Template(name, path, bundled, body[head.end() :], parameters, about, trainer)


def values(template: Template, given: Mapping[str, Any]) -> dict[str, Any]:
    """Set the template's parameters: given values, converted to the default's type, or else the default.

    Raises:
        UsageError: an unknown parameter (names the nearest), or a value of the wrong type.
    """
    known = {parameter.name: parameter for parameter in template.parameters}
    found = {name: parameter.default for name, parameter in known.items()}
    for name, value in given.items():
        if name not in known:
            remedy = did_you_mean(name, known) or f" `skyspot templates show {template.name}` lists its parameters."
            raise UsageError(f"template {template.name} has no parameter {shown(name)}.{remedy}")
        found[name] = _typed(name, known[name].default, value)
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise UsageError(f"template {template.name} needs --set {missing[0]}=...: {known[missing[0]].help}")
    return found


def _typed(name: str, default: Any, value: Any) -> Any:
    """Convert a given value: text stays text if the default is text; else it must be of the default's type."""
    if isinstance(default, str) or default is None:
        if not isinstance(value, (str, int, float, bool)):
            raise UsageError(f"--set {name}: {shown(str(value))} is not text")
        return emitter.refuse_unwritable(
            f"--set {name}", str(value) if not isinstance(value, bool) else str(value).lower()
        )
    wanted = type(default)
    if isinstance(value, str):
        value = _read(value, wanted)
    if wanted is float and type(value) is int:
        value = float(value)
    if wanted is int and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not wanted or value != value or value in (float("inf"), float("-inf")):
        kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(wanted, wanted.__name__)
        raise UsageError(f"--set {name}: must be {kind}, like {default}")
    return value


def _read(text: str, wanted: type) -> Any:
    """Parse a number or boolean from the command line; None if invalid. YAML 1.1 would read 010 as 8."""
    try:
        if wanted is bool:
            return emitter.BOOLEANS[text.lower()]
        return int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else float(text)
    except (KeyError, ValueError):
        return None


def render(template: Template, context: Mapping[str, Any]) -> str:
    """Render the template's text with its values.

    Raises:
        UsageError: the template uses an undefined name, or is not valid Jinja.
    """
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, autoescape=False
    )
    environment.filters["quoted"] = emitter.quoted
    environment.filters["block"] = emitter.block
    environment.filters["plain"] = emitter.plain
    environment.filters["section"] = emitter.section
    environment.filters["entry"] = emitter.entry
    try:
        return environment.from_string(template.text).render(**context)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise UsageError(f"{template.path}{f', line {line}' if line else ''}: {error.message or error}") from None


def eject(name: str, folder: Path) -> Path:
    """Copy a bundled template into `templates/` for editing; return its path.

    Raises:
        UsageError: the file exists already.
    """
    template = (
        read(bundled_folder() / f"{name}{SUFFIX}") if (bundled_folder() / f"{name}{SUFFIX}").exists() else find(name)
    )
    target = folder / "templates" / template.path.name
    if target.exists():
        raise UsageError(f"{target} exists already; edit it, or delete it first")
    text = template.path.read_text(encoding="utf-8")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"{{# ejected from skyspot {__version__} #}}\n{text}", encoding="utf-8")
    except OSError as error:
        raise SkyspotError(f"{error.filename or target}: {error.strerror}") from None
    return target
