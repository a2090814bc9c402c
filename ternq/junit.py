"""A result as JUnit XML, for the test view of a CI server: gates, measurements, and an error.

GitLab, Jenkins and GitHub's reporters read it alike. A gate is a test case that passes or fails; a
task measured is one that says what it found; a command that broke off is one with an error.
"""

from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree import ElementTree as ET

from ternq.errors import TernqError
from ternq.shown import number, printable

Payload = Mapping[str, Any]
_GATE_FAILED = 5


def junit(payload: Payload, error: TernqError | None) -> str:
    """The XML of a command's payload, of what is known of one that broke off in ``error``."""
    name = f"ternq {payload.get('command') or ''}".strip()
    cases = [*_gates(payload), *_tasks(payload)]
    if error and error.exit_code != _GATE_FAILED:
        cases.insert(0, _broken(name, error))
    seconds = payload.get("duration_s")
    counts = {
        "name": name,
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": str(sum(case.find("error") is not None for case in cases)),
        "skipped": "0",
        "time": f"{seconds or 0:.3f}",
    }
    root = ET.Element("testsuites", _clean(counts))
    suite = ET.SubElement(root, "testsuite", _clean(counts))
    _properties(suite, payload)
    suite.extend(cases)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _gates(payload: Payload) -> Iterator[ET.Element]:
    for gate in payload.get("gates") or ():
        label = " ".join(filter(None, (gate["name"], gate["task"])))
        case = _case("gate", _of(label, gate.get("model")))
        said = f"{label}: {number(gate['value'])}, limit {number(gate['limit'])}"
        if gate["passed"]:
            _text(case, "system-out", said)
        else:
            missing = "" if gate["value"] is not None else " (missing or not finite)"
            _text(case, "failure", said + missing, message=said + missing, type="GateError")
        yield case


def _tasks(payload: Payload) -> Iterator[ET.Element]:
    for model, tasks in (payload.get("results") or {}).items():
        for task, values in tasks.items():
            case = _case("task", _of(task, model))
            lines = [f"{key}: {_value(value)}" for key, value in values.items()]
            _text(case, "system-out", "\n".join(lines))
            yield case


def _value(value: Any) -> str:
    return str(value) if isinstance(value, bool | int) else number(value)


def _broken(name: str, error: TernqError) -> ET.Element:
    case = _case("command", name)
    said = error.message if error.hint is None else f"{error.message}\n{error.hint}"
    text = f"{said}\nexit status {error.exit_code}"
    _text(case, "error", text, message=error.message, type=error.kind)
    return case


def _properties(suite: ET.Element, payload: Payload) -> None:
    model = payload.get("model")
    names = ", ".join(map(str, model)) if isinstance(model, list | tuple) else model
    values = {"model": names, **{key: payload.get(key) for key in ("out", "seed", "version")}}
    made = payload.get("settings") or payload.get("made") or {}
    versions = made.get("versions") or {}
    values |= {f"version.{name}": version for name, version in versions.items()}
    kept = {name: str(value) for name, value in values.items() if value is not None}
    if kept:
        folder = ET.SubElement(suite, "properties")
        for name, value in kept.items():
            ET.SubElement(folder, "property", _clean({"name": name, "value": value}))


def _case(kind: str, name: str) -> ET.Element:
    """One test case; a time of its own is not known, and schemas want one."""
    return ET.Element("testcase", _clean({"classname": f"ternq.{kind}", "name": name, "time": "0"}))


def _of(what: str, model: Any) -> str:
    return f"{what} [{model}]" if model else what


def _text(case: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(case, tag, _clean(attributes)).text = printable(text)


def _clean(attributes: Mapping[str, str]) -> dict[str, str]:
    return {name: printable(value) for name, value in attributes.items()}
