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
    owners: dict[str, list[str]] = {}
    for extension in program.extensions:
        fields, extras = extension.extract_all([Param(program, n, extension) for n in program.names_of(extension)])
        program.results[extension.savefield] = fields
        for name, value in extras.items():
            program.extras[_claim_field(program, extension, name, owners)] = value
    _open_losses(program)
    program.refresh_output()
    return program


def _claim_field(program: Program, extension: Extension, name: str, owners: dict[str, list[str]]) -> str:
    """Choose the field of an extra result, and note its parameters in `owners` (field -> parameters)."""
    names = program.names_of(extension)
    field = name if owners.setdefault(name, names) == names else f"{name}_{extension.savefield}"
    if field in program.results or owners.setdefault(field, names) != names:
        raise ExtensionError(f"{extension} sets '{field}' as well, which is taken: give it another savefield=")
    if name in program.borrowing:
        program.borrowing.add(field)
    return field


def _open_losses(program: Program) -> None:
    """Trace through the loss ops, which the walk needed whole: they share their parts with their gradient."""
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
