"""What a chat template reads, found in its syntax tree: variables, lists of content parts, tool calls as objects.

Templates are written against different clients. Some loop over the parts of a message's content, most want one string;
some print the arguments of a tool call as the string that OpenAI's clients send, most want an object. The template
itself says which: by what it does with `content` and with `arguments`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment, nodes

__all__ = ["Reading", "read_template"]

# Set by the chat itself, or by jinja2 inside a macro: not for the caller to choose. Special tokens are not either.
_NOT_OPTIONS = frozenset({"messages", "caller", "varargs", "kwargs"})


@dataclass(frozen=True)
class Reading:
    """variables: names that the caller may set, special tokens not included.

    loops_over_content: it takes content as a list of parts. tests_content_for_string: it takes strings as well.
    wants_arguments_as_text: it prints the arguments of a tool call as they are, so a JSON string stays one.
    """

    variables: frozenset[str]
    loops_over_content: bool
    tests_content_for_string: bool
    wants_arguments_as_text: bool


def read_template(environment: Environment, source: str) -> Reading:
    """What the template `source` reads. Raises jinja2.TemplateSyntaxError."""
    from jinja2 import meta

    tree = environment.parse(source)
    names = meta.find_undeclared_variables(tree) - environment.globals.keys() - _NOT_OPTIONS
    content, arguments = _Field(tree, "content"), _Field(tree, "arguments")
    return Reading(
        frozenset(name for name in names if not name.endswith("_token")),
        content.is_looped_over(),
        content.is_tested_for_string(),
        arguments.is_tested_for_string() or arguments.is_text(),
    )


class _Field:
    """The expressions of a template that mean one field of a message: `m.content`, `m['content']`, or a name for it."""

    def __init__(self, tree: nodes.Template, key: str) -> None:
        self._tree, self._key = tree, key
        self._names: set[str] = set()
        while self._add_names():
            pass

    def _add_names(self) -> bool:
        """Names that a value of the field is assigned to, and parameters of macros that it is passed as."""
        from jinja2 import nodes

        before = len(self._names)
        for assignment in self._tree.find_all(nodes.Assign):
            if isinstance(assignment.target, nodes.Name) and self._is_it(assignment.node):
                self._names.add(assignment.target.name)
        macros = {macro.name: macro for macro in self._tree.find_all(nodes.Macro)}
        for call in self._tree.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is not None:
                passed = zip(macro.args, call.args, strict=False)
                self._names.update(parameter.name for parameter, value in passed if self._is_it(value))
        return len(self._names) > before

    def _is_it(self, node: nodes.Node) -> bool:
        from jinja2 import nodes

        if isinstance(node, nodes.Filter) and node.node is not None:
            return node.name != "tojson" and self._is_it(node.node)  # `content | trim`
        if isinstance(node, nodes.Name):
            return node.name in self._names
        if isinstance(node, nodes.Getattr):
            return node.attr == self._key
        return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == self._key

    def is_looped_over(self) -> bool:
        """Whether there is a loop over it, or a filter that picks from a list."""
        from jinja2 import nodes

        loops = any(self._is_it(loop.iter) for loop in self._tree.find_all(nodes.For))
        picks = ("selectattr", "rejectattr", "map")
        filters = [f for f in self._tree.find_all(nodes.Filter) if f.name in picks and f.node is not None]
        return loops or any(self._is_it(f.node) for f in filters if f.node is not None)

    def is_tested_for_string(self) -> bool:
        """Whether there is `it is string`."""
        from jinja2 import nodes

        return any(test.name == "string" and self._is_it(test.node) for test in self._tree.find_all(nodes.Test))

    def is_text(self) -> bool:
        """Whether it is joined to other text, or printed, as it is."""
        from jinja2 import nodes

        joined: list[nodes.Node] = []
        for sum_ in self._tree.find_all(nodes.Add):
            joined += [sum_.left, sum_.right]
        for concatenation in self._tree.find_all(nodes.Concat):
            joined += concatenation.nodes
        for output in self._tree.find_all(nodes.Output):
            joined += output.nodes
        return any(self._is_it(node) for node in joined)
