"""The JUnit file: against one written by hand, with an XML parser, and with hostile text."""

import math
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from ternq.boundary import UsageMistake
from ternq.errors import GateError, InputError, StoppedError, TernqError
from ternq.junit import junit

EVALUATED: dict[str, Any] = {
    "command": "eval",
    "model": ["a", "b"],
    "seed": 3,
    "out": None,
    "duration_s": 12.5,
    "version": "0.1.0",
    "settings": {"versions": {"torch": "2.13.0"}},
    "results": {
        "a": {"piqa": {"acc": 0.625, "acc_stderr": 0.0125, "samples": 1500, "partial": True}},
        "b": {"wikitext": {"token_perplexity": math.nan, "samples": 140, "partial": False}},
    },
    "gates": [
        {"name": "fail-if-acc-below", "task": "piqa", "value": 0.625, "limit": 0.6,
         "passed": True, "model": "a"},
        {"name": "fail-if-ppl-above", "task": None, "value": None, "limit": 30.0,
         "passed": False, "model": "b"},
    ],
}  # fmt: skip
BY_HAND = """<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="ternq eval" tests="4" failures="1" errors="0" skipped="0" time="12.500">
  <testsuite name="ternq eval" tests="4" failures="1" errors="0" skipped="0" time="12.500">
    <properties>
      <property name="model" value="a, b" />
      <property name="seed" value="3" />
      <property name="version" value="0.1.0" />
      <property name="version.torch" value="2.13.0" />
    </properties>
    <testcase classname="ternq.gate" name="fail-if-acc-below piqa [a]" time="0">
      <system-out>fail-if-acc-below piqa: 0.625, limit 0.6</system-out>
    </testcase>
    <testcase classname="ternq.gate" name="fail-if-ppl-above [b]" time="0">
      <failure message="fail-if-ppl-above: –, limit 30 (missing or not finite)" \
type="GateError">fail-if-ppl-above: –, limit 30 (missing or not finite)</failure>
    </testcase>
    <testcase classname="ternq.task" name="piqa [a]" time="0">
      <system-out>acc: 0.625
acc_stderr: 0.0125
samples: 1500
partial: True</system-out>
    </testcase>
    <testcase classname="ternq.task" name="wikitext [b]" time="0">
      <system-out>token_perplexity: nan
samples: 140
partial: False</system-out>
    </testcase>
  </testsuite>
</testsuites>
"""


def parsed(payload: dict[str, Any], error: TernqError | None = None) -> ET.Element:
    return ET.fromstring(junit(payload, error).encode("utf-8"))


def test_the_file_is_the_one_written_by_hand() -> None:
    assert junit(EVALUATED, None) == BY_HAND


def test_a_failed_gate_is_a_failure_and_no_error_beside_it() -> None:
    assert junit(EVALUATED, GateError("1 of 2 gates failed.")) == BY_HAND


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (InputError("There is no model 'x'.", "Name one."), "InputError", 3),
        (StoppedError("Stopped by SIGTERM."), "StoppedError", 75),
        (UsageMistake("No such option."), "UsageError", 2),
    ],
)
def test_a_command_that_broke_off_is_an_error(error: TernqError, kind: str, code: int) -> None:
    root = parsed({"command": "eval", "model": "x"}, error)
    (suite,) = root
    assert {k: suite.get(k) for k in ("tests", "failures", "errors")} == {
        "tests": "1", "failures": "0", "errors": "1",
    }  # fmt: skip
    (case,) = suite.iter("testcase")
    found = case.find("error")
    assert found is not None and found.text is not None
    assert (case.get("name"), found.get("type")) == ("ternq eval", kind)
    assert found.get("message") == error.message
    assert found.text.splitlines() == list(
        filter(None, (error.message, error.hint, f"exit status {code}"))
    )


def test_an_error_after_gates_stands_beside_them() -> None:
    suite = parsed(EVALUATED, InputError("The disk is full."))[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("5", "1", "1")


def test_counts_are_those_of_the_cases_in_every_suite() -> None:
    for element in [parsed(EVALUATED), parsed(EVALUATED)[0]]:
        cases = list(element.iter("testcase"))
        assert element.get("tests") == str(len(cases))
        assert element.get("failures") == str(sum(c.find("failure") is not None for c in cases))


def test_versions_of_what_was_made_are_properties() -> None:
    root = parsed({"command": "ternarize", "made": {"versions": {"torch": "2.13.0"}}})
    assert {p.get("name"): p.get("value") for p in root.iter("property")} == {
        "version.torch": "2.13.0"
    }


def test_without_a_command_and_a_payload_there_still_is_a_file() -> None:
    root = parsed({}, TernqError("No such command."))
    assert [case.get("name") for case in root.iter("testcase")] == ["ternq"]


HOSTILE = "</testcase>&\"'<![CDATA[]]>\x00\x1b\x0b\ufffe\ud800\u202eend"
SEEN = "</testcase>&\"'<![CDATA[]]>\ufffd\ufffd\ufffd\ufffd\ufffd\ufffdend"


def test_text_that_xml_forbids_or_reads_as_marks_comes_back_as_text() -> None:
    gate = {"name": HOSTILE, "task": HOSTILE, "value": 1.0, "limit": 0.5, "passed": False}
    payload = {
        "command": HOSTILE,
        "model": HOSTILE,
        "gates": [{**gate, "model": HOSTILE}],
        "results": {HOSTILE: {HOSTILE: {"acc": 0.5}}},
        "settings": {"versions": {HOSTILE: HOSTILE}},
    }
    root = parsed(payload, InputError("x"))
    names = [case.get("name") for case in root.iter("testcase")]
    assert names == [f"ternq {SEEN}", f"{SEEN} {SEEN} [{SEEN}]", f"{SEEN} [{SEEN}]"]
    values = {p.get("name"): p.get("value") for p in root.iter("property")}
    assert values == {"model": SEEN, f"version.{SEEN}": SEEN}
