"""The library's errors as the command line says them: its parameters by the options that were typed.

factor must be above 1 and finite, got 1.0; pass 8, say.      --factor must be above 1 and finite, …
factor or target_len must be given, …; pass factor=8, say.    --factor or --target-len …; pass --factor 8, say.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec

P = ParamSpec("P")

# What a function below calls otherwise than the command above it, where that has such an option.
OTHERWISE = {"config": "model", "source": "text", "checkpoint": "out"}
KINDS = (ValueError, TypeError, OSError)  # of bad input


def errors_by_options(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose errors name its options."""
    parameters = list(inspect.signature(command).parameters)

    @wraps(command)
    def called(*arguments: P.args, **options: P.kwargs) -> None:
        try:
            command(*arguments, **options)
        except KINDS as error:
            said = by_options(str(error), parameters)
            if said == str(error):
                raise
            raise next(kind for kind in KINDS if isinstance(error, kind))(said) from error

    return called


def by_options(message: str, parameters: Iterable[str]) -> str:
    """An error's message, with options for the parameters that it is about, and for those that it asks for.

    In front of "must" a name is a parameter; behind it only where it cannot be a word: with an underscore, or a value.

    Args:
        message: `<name> must <rule>, got <what came>; <what to do>.`; another one comes back as it is.
        parameters: of the command, each an option.
    """
    typed = {name: name for name in parameters}
    typed |= {name: option for name, option in OTHERWISE.items() if option in typed}
    options = {name: f"--{option.removeprefix('as_').replace('_', '-')}" for name, option in typed.items()}
    parameter = f"(?:{'|'.join(map(re.escape, options))})"
    about, must, rest = message.partition(" must ")
    if not must:
        return message
    if re.fullmatch(rf"{parameter}(\[\d+\])?((, | or | and ){parameter})*", about):
        about = re.sub(rf"\b{parameter}\b", lambda found: options[found[0]], about)
    rest = re.sub(rf"\b({parameter})=(?=\S)", lambda found: f"{options[found[1]]} ", rest)
    underscored = rf"(?<![\w-])(?=\w*_){parameter}(?!\w)"
    return f"{about} must {re.sub(underscored, lambda found: options[found[0]], rest)}"
