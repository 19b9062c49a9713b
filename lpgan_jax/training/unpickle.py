"""The bytes in a pickle of NumPy arrays, read without running it.

A pickle is a program, and a list of the names that it may load does not tame it: `numpy.dtype`
alone, given a state of the file's choice, turns bytes of the file into pointers. So the few
instructions that texts, numbers, lists, dicts and arrays of bytes need are interpreted here, on
values of our own: nothing that the file names is ever loaded, called or given a state.
"""

import pickletools
import warnings
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np

_MOST_INSTRUCTIONS = 10**6  # one may take a byte of the file, and a hundred of memory


@dataclass(eq=False)
class Bytes:
    """What the file says of a NumPy array."""

    values: np.ndarray | None = None
    """uint8[rows, columns], once the file has told."""


class _Name(Enum):
    """What a pickle of an array names; only a mark on the stack here."""

    RECONSTRUCT = auto()
    NDARRAY = auto()
    DTYPE = auto()
    ENCODE = auto()  # makes bytes of a text, in old protocols of Python 3
    UINT8 = auto()  # the dtype itself


_NAMES = {
    "numpy.core.multiarray _reconstruct": _Name.RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": _Name.RECONSTRUCT,
    "numpy ndarray": _Name.NDARRAY,
    "numpy dtype": _Name.DTYPE,
    "_codecs encode": _Name.ENCODE,
}


def unpickle(data: bytes) -> Any:
    """The value in a pickle of protocol 2 to 4, as Python 2 and 3 write them.

    Args:
        data: the pickle. It takes memory in proportion to its size.

    Returns:
        None, bool, int, str, bytes (also for the texts of Python 2), tuple, list, dict with texts
        as keys, or `Bytes` for an array uint8[rows, columns].

    Raises:
        ValueError: it is damaged, holds anything else, or would run code.
    """
    try:
        with warnings.catch_warnings():  # of escapes, in texts of instructions that are refused
            warnings.simplefilter("ignore", DeprecationWarning)
            return _Machine(data).run()
    except (IndexError, KeyError):  # of a stack or a memo that lacks what is asked for
        raise ValueError("damaged") from None


class _Machine:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}
        self.encoded = 0

    def run(self) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self.data)):
            if opcode.name == "STOP":
                return self.stack.pop()
            if count == _MOST_INSTRUCTIONS:
                raise ValueError(f"more than {_MOST_INSTRUCTIONS} instructions")
            self.step(opcode.name, argument)
        raise ValueError("no end")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "BINSTRING" | "SHORT_BINSTRING":  # a text of Python 2
                stack.append(argument.encode("latin-1"))
            case (
                "BININT" | "BININT1" | "BININT2" | "LONG1"
                | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
                | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8"
            ):  # fmt: skip
                stack.append(argument)
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items = tuple(self.since_mark())
                self.stack.append(items)
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                self.extend([stack.pop()])
            case "APPENDS":
                self.extend(self.since_mark())
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.update([key, value])
            case "SETITEMS":
                self.update(self.since_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_named(argument))
            case "STACK_GLOBAL":
                within, module = stack.pop(), stack.pop()
                if type(module) is not str or type(within) is not str:
                    raise ValueError("a name that is no text")
                stack.append(_named(f"{module} {within}"))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.called(function, arguments))
            case "BUILD":
                state = stack.pop()
                _give_state(stack[-1], state)
            case _:
                raise ValueError(f"the instruction {name}, which arrays do not need")

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("items of what is no list")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        """Set keys, at even places, to the values that follow them."""
        keys, values = items[::2], items[1::2]
        if type(self.stack[-1]) is not dict or len(keys) != len(values):
            raise ValueError("items of what is no dict")
        if any(type(key) not in (str, bytes) for key in keys):  # others may take ages to hash
            raise ValueError("a key that is no text")
        self.stack[-1].update(zip(keys, values, strict=True))

    def called(self, function: Any, arguments: Any) -> Any:
        """What a call would return, if it is one that makes arrays."""
        match function, arguments:
            case _Name.ENCODE, (str(text), "latin1"):
                self.encoded += len(text)  # one text may be encoded again and again
                if self.encoded > len(self.data):
                    raise ValueError("more bytes than the file has")
                return text.encode("latin-1")
            case _Name.DTYPE, ("u1" | b"u1", _, _):
                return _Name.UINT8
            case _Name.DTYPE, _:
                raise ValueError("an array that is not of uint8")
            case _Name.RECONSTRUCT, (_Name.NDARRAY, (0,), b"b"):
                return Bytes()
        raise ValueError("a call that makes no array")


def _named(name: str) -> _Name:
    if name not in _NAMES:
        raise ValueError(f"refused to load {name[:100].replace(' ', '.')}")
    return _NAMES[name]


def _give_state(target: Any, state: Any) -> None:
    match target, state:
        case _Name.UINT8, (int(), "|" | b"|", None, None, None, -1, -1, 0):
            return
        case Bytes(), (1, (int(rows), int(columns)), _Name.UINT8, bool(fortran), bytes(content)):
            if min(rows, columns) > 0 and rows * columns == len(content):
                order: Any = "F" if fortran else "C"
                array = np.frombuffer(content, np.uint8)
                target.values = array.reshape((rows, columns), order=order)
                return
    raise ValueError("a state that is none of an array uint8[rows, columns]")
