"""The API pages: signatures as the source has them, docstrings, formulas, examples, and which names are shown."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

import api_examples
import docstrings
from docutils import nodes
from links import external_link
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.nodes import make_refnode

PACKAGE = "diffusion_jax"
_LONGEST_VALUE = 160  # characters


def public_names(module: str) -> list[str]:
    """The names of `__all__`, or else the names without an underscore that the module defines."""
    names = getattr(importlib.import_module(module), "__all__", None)
    if names is None:
        names = [name for name in _definitions(module) if "." not in name and not name.startswith("_")]
    return list(names)


def page_of(module: str, name: str) -> str:
    """The module whose page documents `module.name`: a package above `module`, or the module that defines the object.

    For an object of another project, returns that project's module name, which has no page.
    """
    value = getattr(importlib.import_module(module), name)
    if module == PACKAGE:  # the package exports a submodule's names
        for below in filter(inspect.ismodule, vars(importlib.import_module(PACKAGE)).values()):
            if name in public_names(below.__name__) and getattr(below, name, None) is value:
                return below.__name__
    owner = getattr(value, "__module__", None) if inspect.isclass(value) or inspect.isroutine(value) else None
    if owner is not None and not f"{owner}.".startswith(f"{module}."):
        module = owner
    parent = module.rpartition(".")[0]
    while parent.startswith(PACKAGE + "."):
        package = importlib.import_module(parent)
        if name in public_names(parent) and getattr(package, name, None) is value:
            module = parent
        parent = parent.rpartition(".")[0]
    return module


@functools.cache
def _definitions(module: str) -> Mapping[str, ast.AST]:
    """The functions, classes, methods and constants of a module by their qualified names."""
    path = getattr(importlib.import_module(module), "__file__", None)
    found: dict[str, ast.AST] = {}

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found[prefix + node.name] = node
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        found[prefix + target.id] = node

    if path:
        add(ast.parse(pathlib.Path(path).read_text()).body, "")
    return found


def _origin(module: str, name: str) -> str:
    """The module that defines what `module` calls `name`."""
    value = getattr(sys.modules.get(module), name.partition(".")[0], None)
    defined_in = getattr(value, "__module__", None)
    if isinstance(defined_in, str) and defined_in.startswith(PACKAGE):
        return defined_in
    for other in list(sys.modules):  # a constant does not know its module
        if other.startswith(module + ".") and name in _definitions(other):
            if getattr(sys.modules[other], name, None) is value:
                return other
    return module


def source_lines(module: str, name: str) -> tuple[pathlib.Path, int, int] | None:
    """File, first line and last line of an object; None where no source defines it."""
    importlib.import_module(module)
    origin = _origin(module, name)
    node = _definitions(origin).get(name)
    if node is None:
        return None
    return pathlib.Path(str(sys.modules[origin].__file__)), node.lineno, node.end_lineno or node.lineno


def _format_annotation(annotation: Any) -> str:
    if isinstance(annotation, typing.ForwardRef):
        return annotation.__forward_arg__
    if isinstance(annotation, str):
        return annotation
    return inspect.formatannotation(annotation)


def _format_default(value: Any) -> str:
    if inspect.isfunction(value) or inspect.isclass(value):
        module = value.__module__.removeprefix(f"{PACKAGE}.")
        return f"{module}.{value.__qualname__}" if value.__module__.startswith(PACKAGE) else value.__qualname__
    if isinstance(value, Mapping) and not isinstance(value, dict):
        value = dict(value)
    text = repr(value)
    return "..." if text.startswith("<") or " at 0x" in text else text


def format_signature(value: Any) -> tuple[str, str] | None:
    """(arguments, result) for a function or class, with the source's annotations; None without a signature."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return None
    parameters = []
    for parameter in signature.parameters.values():
        if _is_flax_module(value) and parameter.name in ("parent", "name"):
            continue
        changes: dict[str, Any] = {}
        if parameter.annotation is not parameter.empty:
            changes["annotation"] = _Text(_format_annotation(parameter.annotation))
        if parameter.default is not parameter.empty:
            changes["default"] = _Text(_format_default(parameter.default))
        parameters.append(parameter.replace(**changes))
    if inspect.ismethod(value) or (inspect.isfunction(value) and parameters[:1] and parameters[0].name == "self"):
        parameters = [parameter for parameter in parameters if parameter.name != "self"]
    text = str(signature.replace(parameters=parameters, return_annotation=signature.empty))
    if inspect.isclass(value) or signature.return_annotation is signature.empty:
        return text, ""
    return text, _format_annotation(signature.return_annotation)


class _Text(str):
    """A string that `inspect` shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _is_flax_module(value: Any) -> bool:
    return inspect.isclass(value) and any(base.__module__ == "flax.linen.module" for base in value.__mro__)


def _process_signature(app, what, name, obj, options, args, result):
    if what in ("function", "class", "method", "exception"):
        if args is None:
            return None
        if inspect.isclass(obj) and issubclass(obj, typing.Protocol) and typing.Protocol in obj.__bases__:  # type: ignore[arg-type]
            return "", ""
        if what == "function":  # the signature of the function itself in place of one for each overload
            analyzer = ModuleAnalyzer.for_module(obj.__module__)
            analyzer.analyze()
            analyzer.overloads.clear()
        return format_signature(obj) or (args, result)
    return None


def _comment_above(module: str, name: str) -> str:
    """The comment above the definition of a constant, or behind it."""
    origin = _origin(module, name)
    node = _definitions(origin).get(name)
    if node is None:
        return ""
    lines = pathlib.Path(str(sys.modules[origin].__file__)).read_text().splitlines()
    comment: list[str] = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.startswith("#"):
            break
        comment.insert(0, line.lstrip("#: "))
    if not comment and "  # " in lines[node.lineno - 1]:
        comment = [lines[node.lineno - 1].rpartition("  # ")[2]]
        comment[0] = comment[0][:1].upper() + comment[0][1:] + "."
    return "\n".join(comment)


def _process_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    if what == "data":
        module, _, constant = name.rpartition(".")
        lines[:] = docstrings.to_rst(_comment_above(module, constant))
        return
    text = "\n".join(lines)
    if what == "class" and dataclasses.is_dataclass(obj) and text.startswith(f"{obj.__name__}("):
        text = ""  # the signature that dataclasses writes for a class without a docstring
    lines[:] = docstrings.to_rst(text)
    if what == "class" and _is_flax_module(obj):
        for base in obj.__mro__[1:]:
            fields = (
                inspect.cleandoc(base.__doc__ or "").partition("\n\n")[2] if base.__module__.startswith(PACKAGE) else ""
            )
            lines += [f"Fields of ``{base.__name__}``:", "", *docstrings.to_rst(fields)] if fields else []
    module, _, own = name.rpartition(".")
    path = api_examples.path_of(module)
    if own in (sections := api_examples.sections(path)):
        app.env.note_dependency(path)
        formula, example = api_examples.to_rst(sections[own])
        end = lines.index("") + 1 if "" in lines else len(lines)
        lines[:] = [*lines[:end], *formula, *lines[end:], *example]
    if what == "module":  # autodoc leaves out the constants
        for constant in constants(name):
            lines += [f".. autodata:: {name}.{constant}", ""]


def constants(module: str) -> list[str]:
    """The public names that are neither functions, classes nor modules, and that no other page has."""
    values = importlib.import_module(module)

    def is_constant(value: Any) -> bool:
        return not (inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value))

    names = [name for name in public_names(module) if is_constant(getattr(values, name))]
    return [name for name in names if page_of(module, name) == module]


def _skip_member(app, what, name, obj, skip, options) -> bool | None:
    """Leaves out what another page has, and fields whose class describes them."""
    if what == "module":
        module = app.env.current_document.autodoc_module
        return True if page_of(module, name) != module else None
    if what in ("class", "exception"):
        documented = bool(getattr(obj, "__doc__", None)) and not str(obj.__doc__).startswith("Alias for field")
        is_function = inspect.isfunction(obj) or isinstance(obj, property | functools.cached_property)
        return None if is_function and (documented or name == "__call__") else True
    return None


def _show_values(app: Sphinx, domain: str, objtype: str, content: addnodes.desc_content) -> None:
    """Shows the value of a constant as the source has it, if that is short."""
    if domain != "py" or objtype != "data":
        return
    for signature in content.parent.findall(addnodes.desc_signature):
        node = _definitions(_origin(signature["module"], signature["fullname"])).get(signature["fullname"])
        source = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        value = getattr(sys.modules[signature["module"]], signature["fullname"])
        simple = isinstance(value, tuple | str | int | float) and "<" not in repr(value)
        text = repr(value) if simple else ast.unparse(source) if source is not None else ""
        for annotation in list(signature.findall(addnodes.desc_annotation)):
            signature.remove(annotation)
        if 0 < len(text) <= _LONGEST_VALUE:
            signature += addnodes.desc_annotation("", f" = {text}")


def _resolve_annotation(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, contnode: nodes.Element):
    """Links a name in a signature to its page; names of other projects stay text where intersphinx does not find them."""
    if node.get("refdomain") != "py" or not node.get("refdoc", "").startswith("reference/api/"):
        return None
    objects = env.domains.python_domain.objects
    module = node.get("py:module") or PACKAGE
    full = _documented_name(module, node["reftarget"], objects)
    if full is None:
        return external_link(app, _external_name(module, node["reftarget"]), contnode) or contnode
    return make_refnode(app.builder, node["refdoc"], objects[full].docname, objects[full].node_id, contnode, full)


def _documented_name(module: str, target: str, objects: Mapping[str, Any]) -> str | None:
    """The full name of what a module, or a module below it, calls `target`; None if it is of another project."""
    first, _, rest = target.partition(".")
    importlib.import_module(module)
    for name in [module, *(name for name in sys.modules if name.startswith(module + "."))]:
        value = getattr(sys.modules[name], first, None)
        if value is None:
            continue
        for part in filter(None, rest.split(".")):
            value = getattr(value, part, None)
        owner = getattr(value, "__module__", None)
        if isinstance(owner, str) and owner.startswith(PACKAGE) and hasattr(value, "__qualname__"):
            full = f"{page_of(owner, value.__qualname__.partition('.')[0])}.{value.__qualname__}"
            return full if full in objects else None
        if not isinstance(value, types.UnionType | typing._UnionGenericAlias):  # type: ignore[attr-defined]
            return None
        break  # an alias of types does not know its module
    found = [name for name in objects if name.endswith(f".{target}")]
    return found[0] if len(found) == 1 else None


def _external_name(module: str, target: str) -> str:
    """What another project's documentation calls `target` of a module: numpy.ndarray for np.ndarray."""
    first, _, rest = target.partition(".")
    value = getattr(sys.modules[module], first, None)
    return f"{value.__name__}.{rest}" if rest and inspect.ismodule(value) else target


_LINES = re.compile(r'<dl>\s*(<dd><em class="sig-param".*?)</dl>', re.DOTALL)


def _mark_up_parameters(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree) -> None:
    """Signatures of several lines as lines: Sphinx writes lists without terms, which screen readers cannot read."""
    if "body" in context:
        context["body"] = _LINES.sub(
            lambda match: (
                '<span class="sig-lines">'
                + match[1].replace("<dd>", '<span class="sig-line">').replace("</dd>", "</span>")
                + "</span>"
            ),
            context["body"],
        )


_BACK_LINK = re.compile(r'<a class="viewcode-back".*?</a>|<li><a href="builtins.html">builtins</a></li>')


def _remove_back_links(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree) -> None:
    """Pages with source have no links to entries: viewcode does not know the names under which a package exports them."""
    if page.startswith("_modules/"):
        context["body"] = _BACK_LINK.sub("", context["body"])


_SUBMODULES = re.compile(r"^<!-- submodules of ([\w.]+) -->$", re.MULTILINE)


def _list_submodules(app: Sphinx, page: str, source: list[str]) -> None:
    """Replaces the comment `submodules of PACKAGE` by a section for each module in the package."""

    def sections(match: re.Match) -> str:
        package = importlib.import_module(match[1])
        for folder in package.__path__:  # its time changes with its files
            app.env.note_dependency(folder)
        names = sorted(module.name for module in pkgutil.iter_modules(package.__path__, f"{match[1]}."))
        shown = [name for name in names if not name.rpartition(".")[2].startswith("_")]
        return "\n".join(
            f"## `{name.removeprefix(f'{PACKAGE}.')}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n"
            for name in shown
        )

    source[0] = _SUBMODULES.sub(sections, source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the extension."""
    app.connect("source-read", _list_submodules)
    app.connect("autodoc-process-signature", _process_signature)
    app.connect("autodoc-process-docstring", _process_docstring, priority=100)
    app.connect("autodoc-skip-member", _skip_member)
    app.connect("object-description-transform", _show_values)
    app.connect("html-page-context", _mark_up_parameters)
    app.connect("html-page-context", _remove_back_links)
    app.connect("missing-reference", _resolve_annotation)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
