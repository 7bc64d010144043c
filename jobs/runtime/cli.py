"""How every job is called, and how it answers.

A job has a frozen dataclass, its config: a field is a flag, a key of the configuration file and, with the
string below it, a line of `--help`. Defaults give way to the file, the file to the flags. What a person got
wrong is said in one message before any heavy import; what a job did is said in a short table and, as the last
line of stdout, in one JSON object.
"""

import dataclasses
import difflib
import inspect
import itertools
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import EnumType
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jobs.runtime import log
from persona import errors
from persona.errors import PersonaError, UsageError

if TYPE_CHECKING:
    from cyclopts import App

ConfigT = TypeVar("ConfigT")

INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C
JOBS = ("compare", "demo", "embed", "evaluate", "forget", "generate", "import_lamp", "make_requests", "store", "train")

_EVERY_JOB = "Every job"
_CONFIG_HELP = (
    "YAML or JSON file, local or s3://; its keys are the fields above with _ for -, or it is a recipe, which has them "
    "under the job's name; flags win."
)
_SWITCHES = ("true", "false", "yes", "no", "on", "off", "0", "1")
_RULES: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    type(None): "none",
}
_VERBOSE_HELP = "With an error, show its traceback, too."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a job did: rows of cells for people, `result` for programs, `exit_code` for schedulers."""

    table: Sequence[Sequence[str]]
    result: Mapping[str, Any]
    exit_code: int = 0


def run(config_type: type[ConfigT], main: Callable[[ConfigT], Summary], argv: Sequence[str] | None = None) -> int:
    """Read flags and file into a `config_type`, give it to `main`, print the summary, return the exit code.

    `config_type` raises `UsageError` when it is made of values that do not go together. A
    `PersonaError`, also one that Ray brings back from a worker, ends as one message on stderr; `--verbose`
    (or PERSONA_VERBOSE=1) adds the traceback. Any other exception is a bug and passes through, traceback and
    all. A Ray that `main` has started is stopped.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in arguments or os.environ.get("PERSONA_VERBOSE", "") not in ("", "0")
    ray_was_running = _ray_is_running()
    try:
        try:
            config = read_config(config_type, arguments)
            if config is None:  # --help was asked for, and given
                return 0
            summary = main(config)
        finally:
            # Ray prints the workers' logs from a thread of its own, which must not speak after the last line.
            if not ray_was_running and _ray_is_running():
                sys.modules["ray"].shutdown()
    except KeyboardInterrupt:
        log.say("interrupted", level="warning")
        return INTERRUPTED
    except Exception as error:
        known = find_persona_error(error)
        if known is None and not log.in_json():
            raise
        trace = "".join(traceback.format_exception(error)) if verbose or known is None else None
        log.say(str(known or repr(error)), level="error", trace=trace)
        return known.exit_code if known is not None else 1
    print_summary(summary)
    return summary.exit_code


def find_persona_error(error: BaseException) -> PersonaError | None:
    """The PersonaError that `error` is or carries, however many layers of Ray lie around it.

    Ray's wrappers keep the worker's exception in `cause` (tasks) or `worker_failures` (training) and may have
    the type of what they wrap, with a whole traceback as their text: hence inside before outside. Ray Data,
    and an actor that fails to start, keep that text only. An error that was merely being handled when a bug
    struck does not count.
    """
    seen: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or any(current is one for one in seen):
            continue
        seen.append(current)
        failures = getattr(current, "worker_failures", {})
        inside = [getattr(current, "cause", None), *failures.values()]
        inside = [one for one in inside if isinstance(one, BaseException)]
        if isinstance(current, PersonaError) and not inside:
            return current
        waiting += [current.__cause__, *reversed(inside)]
    texts = (str(one) for one in seen if type(one).__module__.startswith("ray."))
    return next((found for found in map(_read_traceback, texts) if found is not None), None)


def _read_traceback(text: str) -> PersonaError | None:
    """The PersonaError in which a traceback ends, or that caused what it ends in."""
    found = list(re.finditer(r"^persona\.errors\.(\w+): (.+?)(?=\n\s*\n|\Z)", text, re.MULTILINE | re.DOTALL))
    if not found or "During handling of the above exception" in text[found[-1].end() :]:
        return None
    kind = getattr(errors, found[-1][1], None)
    return kind(found[-1][2].strip()) if isinstance(kind, type) and issubclass(kind, PersonaError) else None


def print_summary(summary: Summary) -> None:
    """Print the table, columns aligned, and then the result as one line of JSON, in which NaN is null."""
    columns = itertools.zip_longest(*summary.table, fillvalue="")
    widths = [max(map(len, column)) for column in columns]
    for row in summary.table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())
    print(json.dumps(plain(summary.result), allow_nan=False), flush=True)


def read_config(config_type: type[ConfigT], argv: Sequence[str]) -> ConfigT | None:
    """Defaults < `--config FILE` < flags, checked; None when `--help` was printed instead.

    Raises `UsageError` for what is unknown, missing or does not fit, `StorageError` for a file on s3:// that
    cannot be had.
    """
    from cyclopts import CycloptsError

    app, read = _parser(config_type)
    if "--help" in argv or "-h" in argv:  # asked for directly: the parser would first make sense of all the rest
        app.help_print(())
        return None
    try:
        app(argv, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        raise UsageError(_explain(error, config_type)) from error
    return read[0]


def _parser(config_type: type[ConfigT]) -> tuple["App", list[ConfigT]]:
    """The command line of a config, and the list into which it puts the config it has read."""
    from cyclopts import App, Parameter
    from cyclopts.config import Dict
    from cyclopts.help import DefaultFormatter, PanelSpec

    read: list[ConfigT] = []
    # The parser wants to know what a config is when nobody says anything, if that can be: a field that
    # must be given has neither default, so both are MISSING.
    required = [f for f in dataclasses.fields(config_type) if f.default is f.default_factory]  # type: ignore[arg-type]
    default: Any = inspect.Parameter.empty if required else config_type()

    def job(
        *,
        fields: Annotated[config_type, Parameter(name="*")] = default,  # type: ignore[valid-type]
        config: Annotated[str | None, Parameter(group=_EVERY_JOB, help=_CONFIG_HELP)] = None,
        verbose: Annotated[bool, Parameter(group=_EVERY_JOB, negative=(), help=_VERBOSE_HELP)] = False,
    ) -> None:
        del config, verbose  # settle() and run() have used them
        read.append(fields)

    def settle(app: "App", commands: tuple[str, ...], arguments: Any) -> None:
        tokens = arguments["--config"].tokens
        if tokens:
            uri = tokens[-1].value
            Dict(_read_file(uri, config_type), source=uri)(app, commands, arguments)
        _check_numbers(arguments)

    # A module's docstring comes in lines of our width; joined, a paragraph takes the width of the terminal.
    module = sys.modules[config_type.__module__]
    spec = getattr(module, "__spec__", None)
    app = App(
        name=f"python -m {spec.name}" if spec is not None else Path(sys.argv[0]).name,
        help=re.sub(r"(?<=\S)\n(?=\S)", " ", module.__doc__ or ""),
        help_format="plaintext",
        help_formatter=DefaultFormatter(panel_spec=PanelSpec(border_style="dim")),
        version_flags=(),
        config=settle,
        default_parameter=Parameter(consume_multiple=True, negative_iterable=(), negative_none=()),
    )
    app["--help"].group = _EVERY_JOB
    app.default(job)
    return app, read


def _read_file(uri: str, config_type: type) -> dict[str, Any]:
    """The keys and values of a configuration file (JSON is YAML, too), unknown keys refused."""
    import yaml

    try:
        if "://" in uri:
            from persona.storage import read_bytes

            text = read_bytes(uri).decode()
        else:
            text = Path(uri).expanduser().read_bytes().decode()
    except OSError as error:
        raise UsageError(f"--config {uri}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {uri}: is not UTF-8 text (byte {error.start})") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--config {uri}: is neither YAML nor JSON\n{error}") from error
    if values is None:
        return {}
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise UsageError(f"--config {uri}: must be a mapping of keys to values, not a {type(values).__name__}")
    place = f"--config {uri}"
    if any(name in JOBS and isinstance(section, dict) for name, section in values.items()):
        # No flag takes a mapping, so this is a recipe: a section a job, of which each takes its own.
        _check_keys(node, JOBS, place, what="section")
        job = _job_name(config_type)
        if job not in values:
            raise UsageError(f"{place}: has no section {job}, only {', '.join(values)}")
        for name, section in values.items():
            if not isinstance(section, dict):
                raise UsageError(f"{place}: the section {name} must be a mapping of keys to values")
        node = next(section for key, section in node.value if key.value == job)
        values, place = values[job], f"{place}: {job}"
    _check_keys(node, field_names(config_type), place, what="key")
    return values


def _check_keys(node: Any, known: Sequence[str], place: str, *, what: str) -> None:
    """Refuse a key that nobody knows, or that stands there twice."""
    names = [str(key.value) for key, _ in node.value]
    for name in names:
        if name not in known:
            raise UsageError(f"{place}: unknown {what} {name}{_suggestion(name, known)}")
        if names.count(name) > 1:
            raise UsageError(f"{place}: the {what} {name} stands there {names.count(name)} times")


def _job_name(config_type: type) -> str:
    """What follows `python -m jobs.` for the job of this config."""
    module = config_type.__module__
    spec = getattr(sys.modules[module], "__spec__", None)
    return (module if spec is None else spec.name).rpartition(".")[2]


def _check_numbers(arguments: Iterable[Any]) -> None:
    """Refuse what the parser would bend until it fits: 3.5 for a whole number, nan and inf for any."""
    for argument in arguments:
        kinds = _kinds(argument.hint)
        if not kinds & {int, float} or kinds - {int, float, type(None)}:
            continue
        for token in argument.tokens:
            value = token.value
            if type(None) in kinds and (token.implicit_value is None or value.lower() == "none"):
                continue
            try:
                valid = math.isfinite(float(value) if float in kinds else int(value, base=0))
            except ValueError:
                valid = False
            if not valid:
                raise UsageError(_misfit(token, argument))


def _explain(error: Any, config_type: type) -> str:
    """One line for a person, from what the parser found wrong."""
    from cyclopts import exceptions

    if isinstance(error, exceptions.UnknownOptionError) and error.token.source != "cli":
        key = (error.token.keyword or error.token.value).split("]")[0].lstrip("[")
        return f"--config {error.token.source}: {key}: a mapping does not fit here; see --help"
    # A flag that nobody knows explains more than the one that is therefore missing.
    flags = ["--config", "--verbose", "--help", *(f"--{name.replace('_', '-')}" for name in field_names(config_type))]
    given = [one.split("=")[0].replace("_", "-") for one in error.unused_tokens or () if one.startswith("--")]
    unknown = [one for one in given if one not in flags and one.replace("--no-", "--", 1) not in flags]
    if isinstance(error, exceptions.UnknownOptionError):
        unknown = [error.token.keyword or error.token.value]
    if unknown:
        return f"unknown flag {unknown[0]}{_suggestion(unknown[0], flags)}"
    if isinstance(error, exceptions.MissingArgumentError) and error.argument is not None:
        if error.keyword is not None:
            return f"{error.argument.name} needs a value: {_rule(error.argument.hint)}"
        return f"{error.argument.name} is missing: give it as a flag, or as a key of the --config file"
    if isinstance(error, exceptions.CoercionError) and error.argument is not None and error.token is not None:
        return _misfit(error.token, error.argument)
    if isinstance(error, exceptions.RepeatArgumentError):
        return f"{error.token.keyword} is given twice"
    if isinstance(error, exceptions.UnusedCliTokensError) and error.unused_tokens:
        value = error.unused_tokens[0]
        switch = "; a switch takes no value: write --flag or --no-flag" if value.lower() in _SWITCHES else ""
        return f"unexpected {value!r}{switch}"
    error.verbose = False
    return str(error)


def field_names(config_type: type) -> list[str]:
    """The fields of a config and of the groups in it: its keys in a file, and its flags with - for _."""
    hints = get_type_hints(config_type)
    names = []
    for field in dataclasses.fields(config_type):
        group = hints[field.name]
        is_group = isinstance(group, type) and dataclasses.is_dataclass(group)
        names += field_names(group) if is_group else [field.name]
    return names


def _misfit(token: Any, argument: Any) -> str:
    """A value that does not fit: the flag, or the file and its key, the value, and the rule."""
    place = argument.name
    if token.source not in ("", "cli"):
        place = f"--config {token.source}: {place.removeprefix('--').replace('-', '_')}"
    value = "null" if token.implicit_value is None else token.value
    return f"{place} {value!r}: must be {_rule(argument.hint)}"


def _rule(hint: Any) -> str:
    """What a field of this type accepts, in words."""
    if get_origin(hint) is Annotated:
        return _rule(get_args(hint)[0])
    if get_origin(hint) is Literal or isinstance(hint, EnumType):
        *most, last = map(str, hint if isinstance(hint, EnumType) else get_args(hint))
        return f"{', '.join(most)} or {last}" if most else last
    if get_origin(hint) in (list, tuple):
        return f"a list, each {_rule(get_args(hint)[0])}"
    if get_args(hint):
        return " or ".join(_rule(one) for one in get_args(hint))
    return _RULES.get(hint, str(hint))


def _kinds(hint: Any) -> set[Any]:
    """The plain types that a hint is made of."""
    if get_origin(hint) is Annotated:
        return _kinds(get_args(hint)[0])
    if get_origin(hint) in (Union, type(int | None), list, tuple):
        return set().union(*(_kinds(one) for one in get_args(hint)))
    return {hint}


def _suggestion(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or nothing when nothing is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "; see --help"


def plain(value: Any) -> Any:
    """The value in JSON's own types; a number that is not finite becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if hasattr(value, "item"):  # a NumPy scalar
        return plain(value.item())
    return str(value)


def _ray_is_running() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
