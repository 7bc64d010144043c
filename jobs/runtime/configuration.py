"""Reads a job's config: defaults, then the file of `--config`, then flags.

A config is a frozen dataclass. A field is a flag, a key of the file and, with its docstring, a line of `--help`; a
field that holds another dataclass (`job_options.FLAT`) adds that one's fields. Every class checks itself when it is
made. All of this happens before any heavy import.
"""

import dataclasses
import inspect
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jobs.runtime.config_file import job_name, read_config_file
from jobs.runtime.usage_messages import explain, misfit
from persona.errors import UsageError

if TYPE_CHECKING:
    from cyclopts import App, Argument, ArgumentCollection

ConfigT = TypeVar("ConfigT")

_EVERY_JOB = "Every job"
_CONFIG_HELP = (
    "YAML or JSON file (local or s3://) with the fields above as keys, _ for -; or the name of a recipe such as "
    "small or lamp_4/paper; flags win over the file."
)
_VERBOSE_HELP = "Show the traceback of an error."


def read_config(config_type: type[ConfigT], argv: Sequence[str], *, program: str | None = None) -> ConfigT | None:
    """The config that these arguments and their `--config` file describe; None when `--help` was printed instead.

    `program` is how the job was called, for the usage line; default `python -m` and its module. A config class may
    name the field that the first argument can give without its flag, as `FIRST_ARGUMENT`.

    Raises:
        UsageError: something is unknown, missing or does not fit.
        StorageError: an object store with the `--config` file does not answer.
    """
    from cyclopts import CycloptsError

    app, read = _parser(config_type, program or _module_call(config_type))
    if "--help" in argv or "-h" in argv:  # the parser would complain about the other arguments first
        app.help_print(())
        return None
    first = getattr(config_type, "FIRST_ARGUMENT", None)
    if first is not None and argv and not argv[0].startswith("-"):
        argv = [f"--{first}", *argv]
    try:
        app(argv, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        raise UsageError(explain(error, keys_of(config_type))) from error
    return read[0]


def keys_of(config_type: type) -> list[str]:
    """The fields of a config and of the dataclasses in it: its keys in a file, and its flags with - for _."""
    hints = get_type_hints(config_type)
    names = []
    for field in dataclasses.fields(config_type):
        group = hints[field.name]
        is_group = isinstance(group, type) and dataclasses.is_dataclass(group)
        names += keys_of(group) if is_group else [field.name]
    return names


def _parser(config_type: type[ConfigT], program: str) -> tuple["App", list[ConfigT]]:
    """The command line of a config, and the list that receives the config it reads."""
    from cyclopts import App, Parameter
    from cyclopts.config import Dict
    from cyclopts.help import DefaultFormatter, PanelSpec

    read: list[ConfigT] = []
    # A required field has neither default, so both are MISSING. Without one, no flag at all is a valid call.
    required = [f for f in dataclasses.fields(config_type) if f.default is f.default_factory]  # type: ignore[arg-type]
    default: Any = inspect.Parameter.empty if required else config_type()

    def job(
        *,
        fields: Annotated[config_type, Parameter(name="*")] = default,  # type: ignore[valid-type]
        config: Annotated[str | None, Parameter(group=_EVERY_JOB, help=_CONFIG_HELP)] = None,
        verbose: Annotated[bool, Parameter(group=_EVERY_JOB, negative=(), help=_VERBOSE_HELP)] = False,
    ) -> None:
        del config, verbose  # add_file() and run() use them
        read.append(fields)

    def add_file(app: "App", commands: tuple[str, ...], arguments: "ArgumentCollection") -> None:
        tokens = arguments["--config"].tokens
        if tokens:
            uri = tokens[-1].value
            values = read_config_file(uri, keys_of(config_type), job_name(config_type), _text_keys(arguments))
            Dict(values, source=uri)(app, commands, arguments)
        _check_numbers(arguments)

    # A module's docstring comes in lines of our width; joined, a paragraph takes the width of the terminal.
    doc = re.sub(r"(?<=\S)\n(?=\S)", " ", sys.modules[config_type.__module__].__doc__ or "")
    app = App(
        name=program,
        help=doc,
        help_format="plaintext",
        help_formatter=DefaultFormatter(panel_spec=PanelSpec(border_style="dim")),
        version_flags=(),
        config=add_file,
        default_parameter=Parameter(consume_multiple=True, negative_iterable=(), negative_none=()),
    )
    app["--help"].group = _EVERY_JOB
    app.default(job)
    return app, read


def _module_call(config_type: type) -> str:
    return f"python -m jobs.{job_name(config_type)}"


def _text_keys(arguments: "Iterable[Argument]") -> set[str]:
    """The fields whose values are texts of any kind, or lists of them."""
    return {name for one in arguments if _plain_types(one.hint) <= {str, type(None)} for name in one.field_info.names}


def _check_numbers(arguments: "Iterable[Argument]") -> None:
    """Refuses what the parser would round or accept: 3.5 for a whole number, and nan and inf."""
    for argument in arguments:
        kinds = _plain_types(argument.hint)
        words = {word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)}
        kinds = {kind for kind in kinds if get_origin(kind) is not Literal}
        if not kinds & {int, float} or kinds - {int, float, type(None)}:
            continue
        for token in argument.tokens:
            value = token.value
            if value in words:
                continue
            if type(None) in kinds and (token.implicit_value is None or value.lower() == "none"):
                continue
            try:
                valid = math.isfinite(float(value) if float in kinds else int(value, base=0))
            except ValueError:
                valid = False
            if not valid:
                raise UsageError(misfit(token, argument))


def _plain_types(hint: Any) -> set[Any]:
    """The plain types that a hint consists of."""
    if get_origin(hint) is Annotated:
        return _plain_types(get_args(hint)[0])
    if get_origin(hint) in (Union, type(int | None), list, tuple):
        return set().union(*(_plain_types(one) for one in get_args(hint) if one is not ...))
    return {hint}
