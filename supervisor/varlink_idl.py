"""The text of the interface ``io.bsup.Supervisor``, drawn from the structs of ``protocol``. No I/O.

May import ``protocol``, ``framing`` and msgspec. The control actor sends it for GetInterfaceDescription; the reference
page of the docs holds it too. Inside a method's lists all types have names: known parsers can't nest parentheses there.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Iterable

from msgspec import inspect as shapes

from supervisor.framing import ERRORS
from supervisor.protocol import INTERFACE, METHODS, SERVICE, Method, Role

_VIEWS = ("View", "Row")
_RENAMED = {"StatusView": "DaemonStatus"}
"""Types and methods share one set of names."""
_ERROR_TYPES = {"job": "int"}

SERVICE_DESCRIPTION = f"""\
# What every varlink service answers.
interface {SERVICE}

# Names the service, and the interfaces it has.
method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

# The description of one of its interfaces.
method GetInterfaceDescription(interface: string) -> (description: string)

# There is no such interface.
error InterfaceNotFound (interface: string)

# The interface has no such method.
error MethodNotFound (method: string)

# The method is named but not there.
error MethodNotImplemented (method: string)

# A parameter is wrong.
error InvalidParameter (parameter: string)

# The peer may not call this.
error PermissionDenied ()

# The method answers in a stream: call it with more.
error ExpectedMore ()
"""


@functools.cache
def description() -> str:
    """The whole interface in varlink's definition language."""
    drawing = _Drawing()
    methods = [drawing.method(name, method) for name, method in METHODS.items()]
    errors = [_error(name) for name in ERRORS]
    intro = _comment("The control socket of bsup, the build supervisor: one daemon a build host.")
    return "\n".join(
        [
            f"{intro}\ninterface {INTERFACE}\n",
            *(drawing.types[name] for name in sorted(drawing.types)),
            *methods,
            *errors,
        ]
    )


class _Drawing:
    """Collects the named types that methods mention."""

    def __init__(self) -> None:
        self.types: dict[str, str] = {}

    def method(self, name: str, method: Method) -> str:
        params, reply = shapes.type_info(method.params), shapes.type_info(method.reply)
        assert isinstance(params, shapes.StructType) and isinstance(reply, shapes.StructType)
        notes = f"For {_at_least(method.role)}." + (" Answers in a stream: call with more." if method.more else "")
        doc = [_comment(_doc(method.params)), _comment(_doc(method.reply)), _comment(notes)]
        taken = self._fields(params, lenient=True)
        given = self._fields(reply, lenient=False)
        return "\n".join([*filter(None, doc), f"method {name}({taken}) -> ({given})\n"])

    def _fields(self, struct: shapes.StructType, *, lenient: bool) -> str:
        """``lenient``: a parameter with a default may be left out."""
        parts = []
        for field in struct.fields:
            drawn = self._type(field.type)
            optional = lenient and not field.required and not drawn.startswith("?")
            parts.append(f"{field.encode_name}: {'?' if optional else ''}{drawn}")
        return _listed(parts)

    def _type(self, shape: shapes.Type) -> str:
        match shape:
            case shapes.Metadata(type=inner):
                return self._type(inner)
            case shapes.BoolType():
                return "bool"
            case shapes.IntType():
                return "int"
            case shapes.FloatType():
                return "float"
            case shapes.StrType() | shapes.DateTimeType() | shapes.BytesType():
                return "string"
            case shapes.ListType(item_type=item):
                return f"[]{self._type(item)}"
            case shapes.RawType() | shapes.DictType(value_type=shapes.AnyType()):
                return "object"
            case shapes.DictType(value_type=value):
                return f"[string]{self._type(value)}"
            case shapes.UnionType(types=types):
                (inner,) = (t for t in types if not isinstance(t, shapes.NoneType))
                return f"?{self._type(inner)}"
            case shapes.EnumType(cls=cls):
                members = [str(member.value) for member in cls]
                return self._named(cls, f"({', '.join(members)})")
            case shapes.StructType(cls=cls):
                return self._named(cls, f"({self._fields(shape, lenient=False)})")
            case _:
                raise TypeError(f"varlink has no type for {shape!r}")

    def _named(self, cls: type, body: str) -> str:
        name = _RENAMED.get(cls.__name__) or next(
            (cls.__name__.removesuffix(view) for view in _VIEWS if cls.__name__.endswith(view)), cls.__name__
        )
        self.types[name] = "\n".join(filter(None, [_comment(_doc(cls)), f"type {name} {body}\n"]))
        return name


def _error(name: str) -> str:
    kind, fields = ERRORS[name]
    parameters = _listed(f"{field}: {_ERROR_TYPES.get(field, 'string')}" for field in fields)
    return f"{_comment(_doc(kind))}\nerror {name} ({parameters})\n"


def _doc(cls: type) -> str:
    """The class's own docstring: not an inherited one, nor one that a base makes up."""
    own = cls.__dict__.get("__doc__")
    return inspect.cleandoc(own).replace("``", "") if isinstance(own, str) else ""


def _comment(text: str) -> str:
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        lines += textwrap.wrap(" ".join(paragraph.split()), 98)
    return "\n".join(f"# {line}" for line in lines)


def _listed(parts: Iterable[str]) -> str:
    """On one line if it fits, else one a line."""
    parts = list(parts)
    flat = ", ".join(parts)
    return flat if len(flat) <= 70 else "\n  " + ",\n  ".join(parts) + "\n"


def _at_least(role: Role) -> str:
    return {Role.VIEWER: "every role", Role.OPERATOR: "operators and admins", Role.ADMIN: "admins"}[role]


if __name__ == "__main__":
    print(description(), end="")
