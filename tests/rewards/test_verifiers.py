"""Every verifier with answers that it accepts and refuses, hostile ones among them."""

import time
from pathlib import Path

import pytest

from stepjax.errors import RecordError
from stepjax.rewards import scorer  # noqa: F401 (registers all functions)
from stepjax.rewards.registry import REWARDS
from stepjax.rewards.verifiers import receipt_verdict
from stepjax.rewards.verify import is_right, verifier_of

HOSTILE = [
    "",
    " \n",
    "9" * 1_000_000,
    "9^9^9^9",
    "1e999999999",
    "1e999",
    "((((" * 10_000,
    "[" * 10_000 + "]" * 10_000,
    r"\boxed{" * 10_000,
    r"\frac{" * 5_000 + "1" + "}" * 5_000,
    "nan",
    "NaN, NaN",
    "inf",
    "-0",
    "\u0664\u0662",  # Arabic digits
    "\u00b2\u00b3",
    "<b>42</b><script>",
    "(nan, nan)",
    "[nan, 0, 1, 1]",
    "[0, 0, 1e400, 1]",
    "\x00\udcff",
    "a " * 500_000,
    "1, " * 300_000,
    "- 1\n" * 200_000,
    "12 m " * 100_000,
    "(1, 1) " * 100_000,
]

# (fields of the record, accepted, refused)
TABLE = {
    "text": [
        ({"answer": "407"}, ["407", " 407\n"], ["408", "0407", "407.", "It is 407", "4 0 7", "\uff14\uff10\uff17"]),
        ({"answer": ["a cat", "a tabby"]}, ["a tabby"], ["a dog", "A cat"]),
    ],
    "receipt": [
        (
            {"answer": {"text": "ok A7B5C1"}},
            ["ok A7B5C1", "bad A7B5C1", "ok A7B5C1\n"],
            ["ok A7B5C2", "ok A7B5", "751 ok"],
        ),
        (
            {"answer": "bad A7"},
            ["ok A7"],
            ["A7", "A7 ok", "yes A7", "ok  A7", "ok a7", "ok A77", "ok A7 ok A7", "ok A7B0", "ok B7"],
        ),
    ],
    "misprint": [({"answer": {"text": "bad A7"}}, ["ok A7"], ["bad A8"])],
    "printed": [({"answer": {"text": "bad A7"}}, ["ok A7"], ["bad A8"])],
    "synthesis": [({"answer": {"text": "ok A7B5"}}, ["ok A7B5"], ["Ref 1 ok A7B5"])],
    "ledger": [({"answer": {"text": "ok A7"}}, ["ok A7", "bad A7"], ["ok A8"])],
    "smudged": [({"answer": {"text": "ok A7"}}, ["ok A7", "bad A7"], ["ok A8"])],
    "ledger_synthesis": [({"answer": {"text": "ok A7B5"}}, ["ok A7B5"], ["Ref 1 ok A7B5"])],
    "math": [
        ({"answer": "1331 and 1728"}, [r"\boxed{1331, 1728}", "The answer is 1728 and 1331."], ["1728", "1331"]),
        ({"answer": "1/2^{99}"}, [r"\boxed{2^{-99}}"], [r"\boxed{1/2^{98}}", "0"]),
        ({"answer": "x+y=0"}, [r"\boxed{2x+2y=0}"], [r"\boxed{2x-y=0}", "0"]),
        ({"answer": "5 m"}, [r"\boxed{5}", "The answer is 5 m"], [r"\boxed{5 km}"]),
        ({"answer": "10%"}, ["0.1", r"\boxed{10\%}"], ["10"]),
        ({"answer": "100/3"}, [r"\frac{100}{3}"], ["33.3", "33.333333"]),
        ({"answer": r"\sqrt{8}"}, [r"\boxed{2\sqrt{2}}"], [r"\boxed{2\sqrt{3}}", "2.83", "}{"]),
        ({"answer": 42}, ["6 x 7 makes 42", r"\boxed{42.0}"], ["43", r"\boxed{42} no, \boxed{41}"]),
    ],
    "choice": [
        ({"answer": "B"}, ["B", "(b)", "B. Paris", "(B) Paris", "The answer is B.", r"\boxed{B}", "Option B"], []),
        ({"answer": "B"}, ["I choose (B) as it is near."], ["C", "A or B", "(A) (B)", "not (B)", "BB", "Paris", "B C"]),
        ({"answer": "(B) Paris"}, ["B"], ["A"]),
        ({"answer": "B", "choices": ["Rome", "Paris"]}, ["paris", "B"], ["Rome", "Paris or Rome", "C"]),
    ],
    "number": [
        ({"answer": 5}, ["5", "5.0", "It is 5.", "5e0", "5 km", "+5"], ["-5", "5 or 6", "5%", "x5", "5,0", "5x"]),
        (
            {"answer": "5 km"},
            ["5 km", "5000 m", "5", "The answer is 5 kilometers."],
            ["5 m", "5 kg", "5 mi", "5 km2"],
        ),
        (
            {"answer": "10 m/s"},
            ["36 km/h", "10 meters per second", "10 m s^{-1}", "10 m s-1", "10 m s^-1"],
            ["36 km", "10 m/s^2", "10 m"],
        ),
        ({"answer": "2 L"}, ["2000 mL", "2 liters", "2000 cm^3", "2 dm\u00b3"], ["2 m", "2 mL"]),
        ({"answer": "3 apples"}, ["3 apple", "3"], ["3 pears", "4 apples"]),
        ({"answer": "10%"}, ["10 %", "0.1"], ["10"]),
        ({"answer": 10}, ["10"], ["10 %"]),
        ({"answer": 5}, [], ["2+3", "10/2", "It is 10/2.", r"\frac{10}{2}", "5*1", "2 + 3 = 6", "--5"]),
        ({"answer": "1/2"}, ["0.5", ".5", "2/4", r"\frac{1}{2}", "50%", "$0.5$"], ["1/3", "1 1/2"]),
        ({"answer": 3.14, "tolerance": 0.01}, ["3.15", "3.13", "about 3.14"], ["3.151", "3.1"]),
        ({"answer": "200 g", "relative_tolerance": 0.05}, ["0.21 kg", "190 g"], ["0.211 kg", "200 kg"]),
        ({"answer": "1234567"}, ["1,234,567", "It has 1,234,567 people."], ["1,234", "1234", "1.234.567"]),
        ({"answer": "-2.5e-3"}, ["-0.0025", r"-2.5 \times 10^{-3}"], ["0.0025", "-2.5e-4"]),
    ],
    "count": [
        (
            {"answer": 4},
            ["4", "four", "There are 4 cats.", "1, 2, 3, 4. The answer is 4", r"\boxed{4}"],
            ["4 4"],
        ),
        (
            {"answer": {"text": "4"}},
            [" 4\n"],
            ["40", "-4", "4.5", "4/5", "4 cats and 2 dogs", "14", "4th", "four or five"],
        ),
        ({"answer": "1000"}, ["1,000"], ["1,00", "1.000", "1000.0"]),
    ],
    "list": [
        ({"answer": ["red", "green"]}, ["green and red", "Red, green", '["red", "green"]', "- red\n- green"], ["red"]),
        (
            {"answer": ["red", "green"]},
            ["Answer:\n1. red\n2. green"],
            ["red, green, blue", "red, red"],
        ),
        ({"answer": "1, 2"}, ["2, 1.0", r"\boxed{1,2}"], ["12", "1,2,2", "(1)"]),
        ({"answer": ["b", "a"], "ordered": True}, ["b, a"], ["a, b"]),
        ({"answer": [str(i) for i in range(50)]}, [", ".join(map(str, range(49, -1, -1)))], ["1, 2"]),
    ],
    "box": [
        (
            {"answer": [10, 10, 20, 20]},
            ["[10, 10, 20, 20]", "(10,10,20,20)", "[10, 10, 20, 15]"],
            ["[20,20,10,10]"],
        ),
        ({"answer": {"box": [0, 0, 2, 2]}}, ["[0, 0, 2.0, 2]"], ["[0, 0, 1, 1]", "[0,0,2]", "[0,0,2,2] or [0,0,1,1]"]),
    ],
    "point": [
        ({"answer": {"box": [10, 20, 15, 50]}}, ["(12, 34)", "(10, 20)", "at (14.9,49)."], ["(9, 34)", "(12, 034)"]),
        ({"answer": {"box": [10, 20, 15, 50]}}, [], ["12, 34", "(12, 34", "(12)", "(12, 34) (12, 34)", "(-12, 34)"]),
        ({"answer": [10.5, 20.5]}, ["(10, 20)"], ["(11, 20)"]),
    ],
}
ROWS = [(name, *row) for name, rows in TABLE.items() for row in rows]


@pytest.mark.parametrize("name, fields, accepted, refused", ROWS, ids=lambda value: str(value)[:40])
def test_answers_accepted_and_refused(name, fields, accepted, refused):
    record = {"id": "a", "verifier": name, **fields}
    assert [text for text in accepted if not is_right(record, text)] == []
    assert [text for text in refused if is_right(record, text)] == []


@pytest.mark.parametrize("name", TABLE)
def test_hostile_answers_are_refused_in_short_time(name):
    record = {"id": "a", "verifier": name, **TABLE[name][0][0]}
    begin = time.process_time()
    assert [text[:20] for text in HOSTILE if is_right(record, text)] == []
    assert time.process_time() - begin < 20


def test_the_names_in_a_record():
    assert verifier_of({}).name == "text" and verifier_of({"task": "receipts"}).name == "text"
    assert verifier_of({"task": "count"}).name == "count"
    assert verifier_of({"task": "count", "verifier": "math"}).name == "math"
    with pytest.raises(RecordError, match="record 'a' has verifier='maths': choose from box, choice,"):
        verifier_of({"id": "a", "verifier": "maths"})


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("text", {"answer": 5}, "give a text or a list of texts"),
        ("choice", {"answer": "Paris"}, "name an option by its letter"),
        ("choice", {"answer": "B", "choices": "AB"}, "has choices='AB'"),
        ("number", {"answer": "many"}, "give a number"),
        ("number", {"answer": 5, "tolerance": -1}, "tolerance=-1"),
        ("number", {"answer": 5, "tolerance": float("nan")}, "tolerance=nan"),
        ("count", {"answer": 4.5}, "give a whole number"),
        ("list", {"answer": []}, "list the items"),
        ("box", {"answer": [0, 0, 1]}, "4 numbers"),
        ("box", {"answer": [1, 1, 0, 0]}, "left must be less"),
        ("point", {"answer": [0, float("nan")]}, "2 numbers"),
        ("point", {"answer": [1, 1], "scale": 0}, "scale=0"),
    ],
)
def test_gold_that_cannot_be_used_is_named(name, fields, message):
    with pytest.raises(RecordError, match=message):
        is_right({"id": "a", "verifier": name, **fields}, "5")


def test_partial_values():
    box, point = (REWARDS[name].function for name in ("box", "point"))
    assert box({"answer": [0, 0, 2, 2]}, "[0, 0, 2, 1]") == 0.5
    assert box({"answer": [0, 0, 2, 2]}, "[1, 1, 3, 3]") == pytest.approx(1 / 7)
    assert box({"answer": [0, 0, 2, 2]}, "[5, 5, 6, 6]") == 0
    assert point({"answer": [0, 0]}, "(3.0, 4.0)") == pytest.approx(0.6065307)  # exp(-5 / 10)
    assert point({"answer": {"box": [0, 0, 4, 9]}, "scale": 2}, "(6.0, 5)") == pytest.approx(0.3678794)
    assert REWARDS["math"].function({"answer": r"\frac{"}, "It is 3.") is None


def test_every_function_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    own = [name for name, each in REWARDS.items() if each.function.__module__.startswith("stepjax.")]
    assert len(own) > 10 and [name for name in own if f"`{name}`" not in page] == []


@pytest.mark.parametrize(
    "text, verdict, value",
    [
        ("ok A7B5", 1.0, 0),
        ("bad A7B5", 1.0, -1),
        ("ok A7B4", 0.0, -1),
        ("bad A7B4", 0.0, 0),
        ("A7B4", 0.0, 0),  # no receipt, so no verdict
    ],
)
def test_a_false_verdict_of_a_receipt_costs(text, verdict, value):
    assert receipt_verdict({}, text, verdict) == value
