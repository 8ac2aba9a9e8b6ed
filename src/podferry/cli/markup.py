"""Elements of a page, built as a tree, so that everything from elsewhere is escaped by construction."""

from __future__ import annotations

from xml.etree.ElementTree import Element, tostring

Child = Element | str | None


def el(tag: str, *children: Child, **attributes: object) -> Element:
    """An element. In attribute names a trailing underscore is dropped, others become dashes: `class_`, `text_anchor`.

    Attributes and children that are None are left out.
    """
    node = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            node.set(name.rstrip("_").replace("_", "-"), _text(value))
    add(node, *children)
    return node


def add(node: Element, *children: Child) -> None:
    """Append text and elements to `node`."""
    for child in children:
        if child is None:
            continue
        if isinstance(child, Element):
            node.append(child)
        elif len(node):
            node[-1].tail = (node[-1].tail or "") + _clean(child)
        else:
            node.text = (node.text or "") + _clean(child)


def render(root: Element) -> str:
    """The document as HTML5."""
    return f"<!doctype html>\n{tostring(root, encoding='unicode', method='html')}\n"


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else _clean(str(value))


def _clean(text: str) -> str:
    return "".join(char for char in text if char.isprintable() or char in "\n\t")
