"""extract: for each extension and parameter a `contract` node over the factors of all uses of the parameter."""

from __future__ import annotations

from fxcurv.errors import ExtensionError
from fxcurv.extensions import Extension, Param
from fxcurv.ir.emit import emit
from fxcurv.ir.graph import canonical_args, invoke
from fxcurv.ir.origin import origin_of
from fxcurv.ir.program import Program
from fxcurv.rules.base import rule_of


def extract(program: Program) -> Program:
    """Fill `program.results` and `program.extras`."""
    if program.loss is not None:
        program.results["grad"] = {name: _gradient(program, name) for name in program.params}
    of: dict[str, list[str]] = {}
    for extension in program.extensions:
        fields, extras = extension.extract_all([Param(program, n, extension) for n in program.names_of(extension)])
        program.results[extension.savefield] = fields
        for name, value in extras.items():
            program.extras[_free(program, extension, name, of)] = value
    _open_losses(program)
    program.refresh_output()
    return program


def _free(program: Program, extension: Extension, name: str, of: dict[str, list[str]]) -> str:
    """The field of an extra result; `of`: the parameters that the fields given so far are of."""
    names = program.names_of(extension)
    field = name if of.setdefault(name, names) == names else f"{name}_{extension.savefield}"
    if field in program.results or of.setdefault(field, names) != names:
        raise ExtensionError(f"{extension} sets '{field}' as well, which is taken: give it another savefield=")
    if name in program.borrowing:
        program.borrowing.add(field)
    return field


def _open_losses(program: Program) -> None:
    """The walk is done with the losses as one op each: traced through, they share their parts with their gradient."""
    for node in list(program.graph.nodes):
        if rule_of(node.target, {}).is_loss:
            value = emit(
                program, invoke, node.target, canonical_args(node), origin=origin_of(node, "forward"), before=node
            )
            program.replace(node, value)
            program.graph.erase_node(node)


def _gradient(program: Program, name: str):
    param = Param(program, name, None)
    direct = program.walked.direct.get(name)
    if direct is not None and not program.walked.uses[name]:
        return emit(program, _first, direct, origin=param.origin())
    total = param.contract(power=1, reduce="vn")
    return total if direct is None else emit(program, _plus, total, direct, origin=param.origin())


def _first(direct):
    return direct[0]


def _plus(total, direct):
    return total + direct[0]
