"""The result of a rehearsal as JUnit XML, for continuous integration."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET  # It writes here, and reads nothing.

from skyspot.rehearsal import attempts, by_kind, faults
from skyspot.rehearsal.result import Kind, Leg, Result

_NOT_IN_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def printable(text: str) -> str:
    r"""Escape what XML cannot hold, as in Python: a color's escape character becomes `\x1b`."""
    return _NOT_IN_XML.sub(lambda found: ascii(found[0])[1:-1], text)


def junit(name: str, result: Result) -> bytes:
    """Write a document: one test case for each kind of preemption, and one for each judged leg.

    Args:
        name: The task's name.
        result: The result. What is not exact is a failure; a kind that was not tried is skipped.
    """
    suite = ET.Element("testsuite", name=printable(f"skyspot rehearse {name}"), time=f"{result.seconds:.1f}")
    for kind in result.kinds:
        # Several rows are of one kind where its places in a save are told apart.
        row = f"{kind.kind} {kind.place}" if kind.kind == faults.AT_WRITE and kind.place else kind.kind
        _kind(ET.SubElement(suite, "testcase", classname="skyspot.rehearsal.kinds", name=printable(row)), kind)
    for leg in result.legs:
        if leg.verdict:
            case = ET.SubElement(suite, "testcase", classname="skyspot.rehearsal.legs", name=printable(leg.name))
            _leg(case, leg)
    if result.notes:
        ET.SubElement(suite, "system-out").text = printable("\n".join(result.notes))
    return _document(suite)


def unfinished(name: str) -> bytes:
    """Write the document of a rehearsal that has not ended: one error."""
    suite = ET.Element("testsuite", name=printable(f"skyspot rehearse {name}"))
    case = ET.SubElement(suite, "testcase", classname="skyspot.rehearsal", name="rehearsal")
    ET.SubElement(case, "error", message="the rehearsal did not end").text = "It was interrupted, or it failed."
    return _document(suite)


def _kind(case: ET.Element, kind: Kind) -> None:
    if kind.outcome == by_kind.NOT_TRIED:
        ET.SubElement(case, "skipped", message=printable(f"{kind.outcome}: {kind.why}"))
    elif kind.outcome != by_kind.EXACT:
        _failure(case, kind.outcome, f"{kind.outcome}: {kind.why}")
    else:
        ET.SubElement(case, "system-out").text = printable(kind.why)


def _leg(case: ET.Element, leg: Leg) -> None:
    assert leg.verdict
    case.set("time", f"{leg.seconds:.1f}")
    if not leg.verdict.exact:
        remedy = f"\nremedy: {leg.verdict.remedy}" if leg.verdict.remedy else ""
        _failure(case, leg.verdict.text.partition(":")[0], f"{leg.verdict.text}{remedy}")
    again = attempts.done_again(leg.rows)
    told = [*([leg.verdict.text] if leg.verdict.exact else []), *leg.verdict.notes]
    text = "\n".join([leg.title, *told, *attempts.lines(leg.rows), *([again] if again else [])])
    ET.SubElement(case, "system-out").text = printable(text)


def _failure(case: ET.Element, kind: str, text: str) -> None:
    message = printable(text.partition("\n")[0])
    ET.SubElement(case, "failure", type=printable(kind), message=message).text = printable(text)


def _document(suite: ET.Element) -> bytes:
    root = ET.Element("testsuites")
    root.append(suite)
    for element in (root, suite):
        cases = list(suite.iter("testcase"))
        element.set("tests", str(len(cases)))
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            element.set(attribute, str(sum(case.find(tag) is not None for case in cases)))
    ET.indent(root)
    found: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return found + b"\n"
