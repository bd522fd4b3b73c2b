"""Makes an SVG of matplotlib's a part of a page: colours from the page's CSS, names of its own, text alternatives."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_FONT = re.compile(r"font: ([\d.]+px)[^;]*|font-family:[^;]*;? ?")
_LONG = re.compile(r"-?\d+\.\d{3,}")
"""Coordinates in points: hundredths are finer than any screen."""
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_DROPPED = {f"{{{_SVG}}}{name}" for name in ("metadata", "style")}


def inline(
    document: bytes, name: str, colours: Mapping[str, str], title: str, about: str, titles: Mapping[str, str]
) -> str:
    """An SVG element for an HTML page.

    Args:
        document: What matplotlib wrote, with `svg.fonttype` none.
        name: Begins all ids, which must differ from those of the page's other plots.
        colours: What stands for each colour (`#010101`) in the page.
        title: What it shows, for those who do not see it.
        about: The same at length.
        titles: By the id of a group: the text that a pointer shows over it.
    """
    root = ET.fromstring(document)
    for parent in root.iter():
        for child in [one for one in parent if one.tag in _DROPPED]:
            parent.remove(child)
    used = set(_references(root))
    for element in root.iter():
        _clean(element, name, colours, used | titles.keys())
        if said := titles.get(element.get("id", "").removeprefix(f"{name}-")):
            _put_first(element, "title", said)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-about")
    _put_first(root, "desc", about).set("id", f"{name}-about")
    _put_first(root, "title", title).set("id", f"{name}-title")
    ET.register_namespace("", _SVG)
    return ET.tostring(root, encoding="unicode")


def _references(root: ET.Element) -> list[str]:
    found = []
    for element in root.iter():
        for key, value in element.attrib.items():
            if key in ("href", f"{{{_XLINK}}}href") and value.startswith("#"):
                found.append(value[1:])
            found += _REFERENCE.findall(value)
    return found


def _clean(element: ET.Element, name: str, colours: Mapping[str, str], kept_ids: set[str]) -> None:
    """Rename what is referred to, drop other ids, and take colours and fonts from the page."""
    style = ""
    for key, value in list(element.attrib.items()):
        value = _COLOUR.sub(lambda found: colours.get(found[0], found[0]), _REFERENCE.sub(rf"url(#{name}-\1)", value))
        del element.attrib[key]
        if key == "d":
            element.set(key, _LONG.sub(lambda found: f"{float(found[0]):.2f}", value))
        elif key == "id":
            if value in kept_ids:
                element.set("id", f"{name}-{value}")
        elif key == f"{{{_XLINK}}}href":
            element.set("href", value.replace("#", f"#{name}-", 1))
        elif key == "style":
            style += _FONT.sub(lambda found: f"font-size: {found[1]}" if found[1] else "", value) + "; "
        elif key in ("fill", "stroke"):  # An attribute knows no var().
            style += f"{key}: {value}; "
        else:
            element.set(key, value)
    if style:
        element.set("style", style.strip().rstrip(";"))


def _put_first(element: ET.Element, tag: str, text: str) -> ET.Element:
    child = ET.Element(f"{{{_SVG}}}{tag}")
    child.text = text
    element.insert(0, child)
    return child
