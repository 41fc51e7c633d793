"""The languages of workflows: expressions, conditions, depends; and how values become text."""

from __future__ import annotations

from typing import Any

import pytest

from tally.errors import SpecError
from tally.pipelines import conditions, document
from tally.pipelines.document import scalar_text, seconds_of, to_json
from tally.pipelines.expressions import ExpressionError, evaluate, parse
from tally.pipelines.values import Values

SCOPE: dict[str, Any] = {
    "inputs": {
        "parameters": {"n": "5", "my-name": "x", "json": '{"a": {"b": [1, 2.5]}, "list": [{"k": 1}, {"k": 2}]}'}
    },
    "steps": {"flip": {"outputs": {"result": "heads"}, "status": "Succeeded"}, "none": None},
    "item": [3, 1, 2],
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2 * 3 - 4 / 2", 5.0),
        ("2 ** 3 ** 2", 512.0),
        ("-7 % 4", -3),
        ("'a' + \"b\" + `c`", "abc"),
        ("1 < 2 && !(2 < 1) || false", True),
        ("not (1 == 2) and 'a' != 'b'", True),
        ("inputs.parameters['my-name'] == 'x' ? 'yes' : steps.gone.outputs.result", "yes"),
        ("steps.gone.outputs.result ?? 'none'", "none"),
        ("steps.none?.outputs", None),
        ("asInt(inputs.parameters.n) == 5 && asFloat('2.5') > 2", True),
        ("jsonpath(inputs.parameters.json, '$.a.b[1]')", 2.5),
        ("jsonpath(inputs.parameters.json, \"$['list'][*].k\")", [1, 2]),
        ("filter(item, {# > 1})", [3, 2]),
        ("map(item, {# * 2})[0]", 6),
        ("count(item, {# > 1})", 2),
        ("all(item, {# > 0}) && any(item, # == 3)", True),
        ("map(fromJSON(inputs.parameters.json).list, {.k})", [1, 2]),
        ("item[1:]", [1, 2]),
        ("1..3", [1, 2, 3]),
        ("2 in item and 9 not in item", True),
        ("'abc' contains 'b' && 'abc' startsWith 'a' && 'abc' endsWith 'c' && 'abc' matches '^a.c$'", True),
        ("item | len()", 3),
        ("toJson({b: 1.0, a: [true, nil]})", '{"a":[true,null],"b":1}'),
        ("sprig.add(1, '2', 3) / 4", 1.5),
        ("sprig.b64dec(sprig.b64enc('x')) + sprig.trim(' y ')", "xy"),
        ("string(0.1) + string(1e21) + string(true)", "0.11e+21true"),
        ("string(1e-7)", "1e-7"),
        ("toJson(fromJSON('[1.50, 1e3]'))", "[1.5,1000]"),
        ("steps.flip['outputs'].result", "heads"),
    ],
)
def test_expressions_have_the_values_that_argo_gives_them(text: str, value: Any) -> None:
    found = evaluate(text, SCOPE)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sprig.genCA('x')", "the function sprig.genCA() is not known here"),
        ("asint('1')", "the function asint() is not known here; did you mean 'asInt'?"),
        ("let x = 1; x", "let is not known here"),
        ("1 +", "it ends too early"),
        ("(1", "')' is expected"),
        ("1 2", "'2' is not expected there"),
        ("a @ b", "'@ b' is not understood"),
    ],
)
def test_what_is_not_known_is_refused_when_it_is_read(text: str, reason: str) -> None:
    with pytest.raises(ExpressionError) as raised:
        parse(text)
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("inputs.parameters.nn", "there is no 'nn' in inputs.parameters; did you mean 'n'?"),
        ("inputs.parameters.n + 1", "'5' is no number; asInt() and asFloat() make one"),
        ("steps.none.outputs", "there is no steps.none, so no 'outputs' of it"),
        ("item[7]", "there is no number 7 among 3"),
        ("1 / 0", "1 / 0"),
        ("asInt('x')", "that is no whole number"),
        ("asInt('1_000')", "that is no whole number"),
        ("asInt(' 12')", "that is no whole number"),
        ("asFloat('1_0.5')", "that is no number"),
        ("asFloat('inf')", "that is no number"),
        ("5 % 0", "5 % 0"),
        ("fromJSON('[NaN]')", "NaN is no number of JSON"),
        ("fromJSON('1e400')", "is too large"),
        ("1 && true", "'1' is neither true nor false"),
        ("jsonpath('{}', '$..a')", "is not understood here"),
        ("jsonpath('{}', '$.a')", "finds nothing"),
    ],
)
def test_what_has_no_value_says_why(text: str, reason: str) -> None:
    with pytest.raises(ExpressionError) as raised:
        evaluate(text, SCOPE)
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", True),
        ("heads == heads", True),
        ("heads == tails || (tails =~ tai && 3 < 10)", True),
        ("'a b' != \"a b\"", False),
        ("10 > 9.5", True),
        ("10 == '10'", False),
        ("3 in (1, 2, 3)", True),
        ("!(true && false)", True),
        ("2 + 3 * 2 == 8", True),
        ("[a-b] == 'a-b'", True),
        ("Succeeded !~ Fail", True),
    ],
)
def test_conditions(text: str, value: bool) -> None:
    assert conditions.when(text) is value


@pytest.mark.parametrize("text", ["a b == c", "a-b == a-b", " == x", "1", "(a == b", "a < 1", "a =~ 1", "true ? 1 : 2"])
def test_conditions_that_argo_refuses_too(text: str) -> None:
    with pytest.raises(ExpressionError, match="when: "):
        conditions.when(text)


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("a", True),
        ("b", False),
        ("b.Failed && a", True),
        ("a && (b || c.Skipped)", True),
        ("!b && c", True),
        ("loop.AnySucceeded && !loop.AllFailed", True),
        ("d-1.Omitted", True),
    ],
)
def test_depends(text: str, met: bool) -> None:
    results = {
        "a": ["Succeeded"],
        "b": ["Failed"],
        "c": ["Skipped"],
        "d-1": ["Omitted"],
        "loop": ["Failed", "AnySucceeded"],
    }
    tree = conditions.depends(text)
    assert conditions.is_met(tree, results) is met
    assert conditions.tasks_of(tree) <= set(results)


def test_values_in_texts() -> None:
    values = Values()
    values["inputs.parameters.a"], values["item"] = "x", {"b": 1, "a": 1.0}
    inner = Values(values)
    inner["inputs.parameters.a"] = "y"
    assert values.substituted({"k": ["{{inputs.parameters.a}}-{{ item }}", 3]}) == {"k": ['x-{"a":1,"b":1}', 3]}
    assert inner.text("{{inputs.parameters.a}} {{=inputs.parameters.a + 'z'}}") == "y yz"
    with pytest.raises(ExpressionError, match=r"\{\{inputs.parameters.b\}\} has no value here; did you mean"):
        inner.text("{{inputs.parameters.b}}")


@pytest.mark.parametrize(
    ("yaml", "text"),
    [("3", "3"), ("0.10", "0.1"), ("1.0", "1"), ("true", "true"), ("0x1F", "31"), ("0755", "493"), ("1_000", "1000"),
     ("1e3", "1000"), ("1e-7", "0.0000001"), ("1e21", "1" + "0" * 21),
     ("2026-03-29", "2026-03-29"), ("12:30", "12:30"), ("'NO'", "NO"), ("~x", "~x")],
)  # fmt: skip
def test_a_parameter_is_the_text_that_argo_makes_of_it(yaml: str, text: str) -> None:
    (read,) = document.parse(
        f"kind: Workflow\nmetadata: {{}}\nspec: {{arguments: {{parameters: [{{name: a, value: {yaml}}}]}}}}", "file"
    )
    assert read.value["spec"]["arguments"]["parameters"][0]["value"] == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "kind: Workflow\nmetadata: {}\nspec: {entrypont: a}",
            "file:3:8: spec.entrypont: WorkflowSpec has no such field; did",
        ),
        (
            "kind: Workflow\nmetadata: {}\nspec: {templates: [{name: n}]}",
            "which YAML takes for false; put it in quotes",
        ),
        (
            "kind: Workflow\nmetadata: {}\nspec: {parallelism: two}",
            "spec.parallelism: is 'two'; it should be a whole number",
        ),
        ("kind: Workflow\nmetadata: {}\nspec: {a: 1, a: 2}", "spec.a: stands here twice"),
        ("kind: Workflow\nspec: [", "file:2:8: not YAML"),
        ("kind: Wrkflow", "kind 'Wrkflow' is no workflow; did you mean 'Workflow'?"),
        ("a: &a [1]\nb: !!python/object:os.x {}", "kind '(none)' is no workflow"),
        ("", "there is nothing in it"),
        ("kind: ConfigMap\ndata: " + "{a: " * 200 + "1" + "}" * 200, "nested too deeply"),
    ],
)
def test_files_that_are_wrong(text: str, reason: str) -> None:
    with pytest.raises(SpecError) as raised:
        document.parse(text, "file")
    assert reason in str(raised.value)


def test_json_as_go_writes_it() -> None:
    assert to_json({"b": "é\n", "a": [1.5, 1e21, 1e-7, 123456789012345678, None]}) == (
        '{"a":[1.5,1e+21,1e-7,123456789012345678,null],"b":"é\\n"}'
    )
    assert scalar_text("x") == "x"
    with pytest.raises(ValueError, match="no number of JSON"):
        to_json(float("nan"))


def test_durations() -> None:
    assert [seconds_of(each) for each in ("10", "1m30s", "2h", "1d", "10ms")] == [10, 90, 7200, 86400, 0.01]
    with pytest.raises(ValueError, match="duration"):
        seconds_of("soon")
