"""Answers of a model about memories: each id has its score, or the whole is an error that shows the answer."""

import json
import pickle
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_sleep_constructs.memory.answers import EXCERPT, ScoreError, Verdict, parse_scores, parse_verdicts

FUZZED = 10_000
WRONG = [True, False, None, 0.7, 7.0, 11, -1, 10**30, "high", "eight", "7.5", "8/100", "", [7], {"value": 7}, float("nan"), float("inf")]
PROSE = ["Sure, here are the scores.", "Note [1]: 3 of 4 words agree", "{not json}", "```json", "```", "\u202e\ud800 \x00", "I rate 8/10 overall",
         "score: 9", "[citation needed]", "}{][", "\n\n", "{}", "[]", '{"memories": 2, "model": "m"}', "'score': 3"]


def records(rng: random.Random, truth: dict[str, int]) -> list[dict[str, object]]:
    order = rng.sample(list(truth), len(truth))
    return [
        {"id": name, "score": rng.choice([truth[name], str(truth[name])])}
        | ({"reason": rng.choice(['says "score: 10"', "{7}", "", '{"id": "zz", "score": 1}'])} if rng.random() < 0.5 else {})
        for name in order
    ]


def written(rng: random.Random, rows: list[dict[str, object]]) -> str:
    """The rows in one of the forms that are read."""
    indent = rng.choice([None, 2])
    form = rng.randrange(5)
    if form == 0:
        return json.dumps(rows, indent=indent)
    if form == 1:
        return json.dumps({rng.choice(["scores", "results"]): rows}, indent=indent)
    if form == 2 and len({str(row["id"]) for row in rows}) == len(rows):
        return json.dumps({str(row["id"]): row["score"] for row in rows}, indent=indent)
    if form == 3 and len({str(row["id"]) for row in rows}) == len(rows):
        inner = {str(row["id"]): {k: v for k, v in row.items() if k != "id"} for row in rows}
        return json.dumps({"scores": inner}, indent=indent)
    return "\n".join(json.dumps(row) for row in rows)


def fuzzed(rng: random.Random) -> tuple[str, dict[str, int], str]:
    """An answer, the scores that it means, and what must come of it: the scores, an error, or either."""
    truth = {f"kq{number}": rng.randint(0, 10) for number in range(rng.randint(2, 10))}
    rows = records(rng, truth)
    fate = "read"
    kind = rng.randrange(9)
    if kind == 0:
        rows[rng.randrange(len(rows))]["score"] = rng.choice(WRONG)
        fate = "error"
    elif kind == 1:
        rows[rng.randrange(len(rows))]["id"] = rng.choice(["kq99", "", "0", 3, "KQ1", "kq1 "])
        fate = "error"
    elif kind == 2:
        del rows[rng.randrange(len(rows))]
        fate = "error"
    elif kind == 3:
        extra = dict(rng.choice(rows))
        extra["score"] = (int(str(extra["score"])) + rng.randint(1, 9)) % 11
        rows.insert(rng.randrange(len(rows) + 1), extra)
        fate = "error"
    elif kind == 4:
        del rows[rng.randrange(len(rows))]["id" if rng.random() < 0.5 else "score"]
        fate = "error"
        return "\n".join(map(json.dumps, rows)), truth, fate
    text = written(rng, rows)
    if kind == 5:
        text, fate = text[: rng.randrange(len(text))], "either"
    elif kind == 6:  # characters that are no digits get lost
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text = text if text[at].isalnum() else text[:at] + text[at + 1 :]
        fate = "either"
    elif kind == 7:
        text, fate = rng.choice(["1e400", "9" * 5000, "-0", "0x7", "[[" * 200, "NaN"]).join(text.split(" ", 1)), "either"
    if rng.random() < 0.5:
        text = "\n".join((rng.choice(PROSE), text, rng.choice(PROSE)))
    return text, truth, fate


def test_fuzzed_answers_are_read_right_or_not_at_all() -> None:
    rng = random.Random(0)
    lost, outcomes = [], {"read": [0, 0], "error": [0, 0], "either": [0, 0]}
    for _ in range(FUZZED):
        answer, truth, fate = fuzzed(rng)
        try:
            scores = parse_scores(answer, list(truth))
        except ScoreError as error:
            outcomes[fate][1] += 1
            assert len(error.excerpt) <= EXCERPT
            if fate == "read":
                lost.append((answer, str(error)))
        else:
            outcomes[fate][0] += 1
            if fate == "error" or scores != truth:
                lost.append((answer, str(scores)))
    print(outcomes)
    assert not lost, (len(lost), lost[0])
    assert min(sum(counts) for counts in outcomes.values()) > 1000 and outcomes["either"][0] > 50


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from('{}[]":,0123456789abescorid/ \n.-e'), max_size=60), st.integers(1, 2))
def test_any_text_is_scores_or_an_error(answer: str, count: int) -> None:
    ids = ["a", "b"][:count]
    try:
        scores = parse_scores(answer, ids)
    except ScoreError:
        return
    assert list(scores) == ids and all(type(score) is int and 0 <= score <= 10 for score in scores.values())


@pytest.mark.parametrize(
    ("answer", "score"),
    [('{"score": 8}', 8), ('{"id": "a", "score": "8/10", "reason": "r"}', 8), ('```json\n{"score": 10}\n```', 10), ("8/10", 8), ("10", 10),
     ("Score: 0", 0), ("**Rating:** 7/10", 7), ("<think>3/10? {\"score\": 3}</think>\n9", 9), ('{"a": 4}', 4)],
)
def test_one_memory_may_be_answered_in_few_words(answer: str, score: int) -> None:
    assert parse_scores(answer, ["a"]) == {"a": score}
    if "{" not in answer:
        with pytest.raises(ScoreError):
            parse_scores(answer, ["a", "b"])


@pytest.mark.parametrize(
    "answer",
    ["8.5", "0.8", "8/100", "80/100", "4/5", "-3", "score: -3", "1e400", "score: 1e400", "NaN", "7-8", "score: 7 to 8", "score: 7, no, score: 8",
     "There are 3 memories.", '{"score": 8', '{"score": 1', '{"score": 8} {"score": 9}', '{"score": 8, "score": 9}', '{"score": true}', "true", "٨",
     '{"id": "b", "score": 8}', "", " ", "[8]"],
)
def test_what_is_not_one_integer_is_an_error(answer: str) -> None:
    with pytest.raises(ScoreError, match=r"the answer was"):
        parse_scores(answer, ["a"])


def test_reasons_come_with_the_scores_and_the_order_is_that_of_the_ids() -> None:
    answer = '{"scores": [{"id": "b", "score": 1, "reason": " names it "}, {"id": "a", "score": 2, "reason": 5}]}'
    verdicts = parse_verdicts(answer, ["a", "b"])
    assert list(verdicts.items()) == [("a", Verdict(2, "")), ("b", Verdict(1, "names it"))]
    assert parse_verdicts("I say 8/10", ["a"]) == {"a": Verdict(8, "I say 8/10")}


def test_the_error_has_an_excerpt_and_can_be_pickled() -> None:
    with pytest.raises(ScoreError) as caught:
        parse_scores("x" * 10_000, ["a", "b"])
    error = caught.value
    assert len(error.excerpt) == EXCERPT and error.excerpt in str(error) and "no score for 2 of 2 ids (a, b)" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ScoreError and str(again) == str(error)


@pytest.mark.parametrize("answer", ["[" * 150_000, '{"a":' * 30_000, "{" * 150_000, '["' * 70_000, "[1," * 60_000, "score " * 30_000, "1" * 190_000, "8/" * 90_000,
                                    "8" + " " * 190_000 + "x", "8" + "*" * 190_000 + "x", "score 1" + " " * 190_000 + "x 2/10", "score" * 39_000, "score:*" * 28_000,
                                    "1 " * 90_000, " " * 190_000, "8 out" * 38_000, "_" * 190_000, "1 /" * 60_000], ids=lambda answer: answer[:6])
def test_hostile_answers_end_soon(answer: str) -> None:
    start = time.perf_counter()
    for ids in (["a"], ["a", "b"]):
        with pytest.raises(ScoreError):
            parse_scores(answer, ids)
    assert time.perf_counter() - start < 8


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"answer: expected a string, not NoneType"):
        parse_scores(None, ["a"])  # type: ignore[arg-type]
    for ids in ([], ["a", "a"], "ab"):
        with pytest.raises(ValueError, match=r"ids: expected"):
            parse_scores("7", ids)
