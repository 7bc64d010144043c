"""The six tasks in their official formats, and that a question sees only its own profile."""

import io
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from persona.errors import InputError
from persona.inputs import lamp_files
from persona.inputs.lamp import TASKS, Rows, parse_date, question_to_rows
from persona.inputs.lamp_files import outputs_json, read_golds, read_questions
from tests import lamp_form

LAMP_5 = TASKS["LaMP_5"]

# task, profile item, text of the behavior, input, query, a gold
OFFICIAL = [
    (
        "LaMP_1",
        {"title": "Attention", "abstract": "We attend."},
        "Attention We attend.",
        (
            'For an author who has written the paper with the title "Deep Nets", which reference is related? '
            'Just answer with [1] or [2] without explanation. [1]: "A Title" [2]: "Another, which reference'
            ' is that"'
        ),
        "Deep Nets",
        "[2]",
    ),
    (
        "LaMP_2",
        {"description": "A robot falls in love.", "tag": "romance"},
        "A robot falls in love.",
        (
            "Which tag does this movie relate to among the following tags? Just answer with the tag name "
            "without further explanation. tags: [sci-fi] description: A job description: spy.\nIn two lines."
        ),
        "A job description: spy.\nIn two lines.",
        "twist ending",
    ),
    (
        "LaMP_3",
        {"text": "Broke at once.", "score": "1"},
        "Broke at once.",
        (
            "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, "
            "or 5 without further explanation. review: Works. My last review: no."
        ),
        "Works. My last review: no.",
        "4",
    ),
    (
        "LaMP_4",
        {"text": "A long article.", "title": "Short"},
        "A long article. Short",
        "Generate a headline for the following article: Rain is expected.",
        "Rain is expected.",
        "Rain",
    ),
    (
        "LaMP_5",
        {"title": "On Tokens", "abstract": ""},
        "On Tokens ",
        "Generate a title for the following abstract of a paper: In this paper: we show.",
        "In this paper: we show.",
        "A Title",
    ),
    (
        "LaMP_7",
        {"text": "cant wait!!"},
        "cant wait!!",
        "Paraphrase the following tweet without any explanation before or after it: so: tired",
        "so: tired",
        "I am tired",
    ),
]


def question(*dates: Any, **fields: Any) -> dict[str, Any]:
    """A LaMP-5 question whose profile has an item (p0, p1, …) for each date."""
    profile = [
        {"id": f"p{n}", "title": f"Title {n}", "abstract": "Text.", "date": date} for n, date in enumerate(dates)
    ]
    return {"id": "q", "input": "an abstract of a paper: Short.", "profile": profile} | fields


def convert(question: Any) -> Rows:
    return question_to_rows(LAMP_5, question, None)


def visible(rows: Rows, behaviors: list[dict[str, Any]]) -> list[str]:
    """The ids of the behaviors visible to the request: those of its user, strictly before `as_of`."""
    request = rows.request
    seen = [one for one in behaviors if one["user_id"] == request["user_id"]]
    if request["as_of"] is not None:
        seen = [one for one in seen if one["timestamp"] is not None and one["timestamp"] < request["as_of"]]
    return [one["behavior_id"] for one in seen]


def test_the_tasks_are_the_public_ones() -> None:
    assert list(TASKS) == ["LaMP_1", "LaMP_2", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7"]
    assert [len(task.metric.labels) for task in TASKS.values()] == [2, 15, 5, 0, 0, 0]
    assert [task.max_new_tokens for task in TASKS.values()] == [128, 128, 10, 128, 128, 128]


@pytest.mark.parametrize(("name", "item", "text", "prompt", "query", "gold"), OFFICIAL, ids=list(TASKS))
def test_official_texts(name: str, item: dict[str, str], text: str, prompt: str, query: str, gold: str) -> None:
    profile = [{"id": "7", **item}]
    rows = question_to_rows(TASKS[name], {"id": "10", "input": prompt, "profile": profile}, gold)
    assert rows.behaviors == [{"user_id": "10", "behavior_id": "00000:7", "text": text, "timestamp": None}]
    assert rows.request == {
        "request_id": "10",
        "user_id": "10",
        "input": prompt,
        "query": query,
        "target": gold,
        "as_of": None,
    }
    assert rows.rejects == []


@pytest.mark.parametrize(
    ("prompt", "query"),
    [
        (
            'the title "On "Fish" and Chips", which reference is related? [1]: "A" [2]: "B"',
            'On "Fish" and Chips',
        ),
        ('the title "Deep Nets"; [1] or [2]?', "Deep Nets"),
    ],
)
def test_a_citation_title_may_contain_quotation_marks(prompt: str, query: str) -> None:
    assert TASKS["LaMP_1"].query(prompt) == query


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2014, datetime(2014, 1, 1, tzinfo=UTC)),
        ("2014", datetime(2014, 1, 1, tzinfo=UTC)),
        ("2014-07", datetime(2014, 7, 1, tzinfo=UTC)),
        ("2014-00", datetime(2014, 1, 1, tzinfo=UTC)),
        ("2014-7-5", datetime(2014, 7, 5, tzinfo=UTC)),
        ("2014-07-05", datetime(2014, 7, 5, tzinfo=UTC)),
        ("2014-07-05 10:20:30", datetime(2014, 7, 5, 10, 20, 30, tzinfo=UTC)),
        ("2014-07-05T10:20:30+02:00", datetime(2014, 7, 5, 8, 20, 30, tzinfo=UTC)),
        ("07 5, 2014", datetime(2014, 7, 5, tzinfo=UTC)),
        ("Sat Jul 05 10:00:00 +0000 2014", datetime(2014, 7, 5, 10, tzinfo=UTC)),
        (None, None),
        ("", None),
    ],
)
def test_dates_become_the_first_instant_in_utc(value: Any, expected: datetime | None) -> None:
    assert parse_date(value) == expected


@pytest.mark.parametrize(
    "value", ["soon", "2014-13", "2014-02-30", "14-02-03", "2014-07-05 25:00", True, 20.5, ["2014"]]
)
def test_an_invalid_date_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="date"):
        parse_date(value)


def test_items_of_the_questions_month_are_visible_in_profile_order() -> None:
    rows = convert(question("2023-06", "2023-07", "2023-07", user_id="ann", date="2023-07"))
    assert visible(rows, rows.behaviors) == ["p0", "p1", "p2"]
    july = datetime(2023, 7, 1, tzinfo=UTC)
    times = [one["timestamp"] for one in rows.behaviors]
    assert times == [datetime(2023, 6, 1, tzinfo=UTC), july, july + timedelta(microseconds=1)]
    assert rows.request["as_of"] == july + timedelta(microseconds=2)


def test_questions_of_one_user_see_their_own_profiles_in_one_store() -> None:
    """Each question's answer is in the next question's profile, often with the same month."""
    months = ["2022-11", "2023-07", "2023-07", "2023-07", "2023-07", "2024-01"]
    parts = [convert(question(*months[:n], id=f"q{n}", user_id="ann", date=months[n])) for n in range(len(months))]
    store = {one["behavior_id"]: one for rows in parts for one in rows.behaviors}
    for n, rows in enumerate(parts):
        assert visible(rows, list(store.values())) == [f"p{item}" for item in range(n)]
        assert all(one == store[one["behavior_id"]] for one in rows.behaviors)


@pytest.mark.parametrize(
    ("dates", "fields"),
    [
        (["2023-06", "2023-07"], {"date": "2023-07"}),  # as in the public LaMP
        (["2023-06", "2023-07"], {"user_id": "ann"}),
        (["2023-06", None], {"user_id": "ann", "date": "2023-07"}),
        (["2023-06", "2023-08"], {"user_id": "ann", "date": "2023-07"}),
        (["2023-06", "2023-05"], {"user_id": "ann", "date": "2023-07"}),
    ],
    ids=["no user", "no date", "undated item", "item from the future", "newest first"],
)
def test_a_question_without_a_place_in_time_becomes_a_separate_user(dates: list[Any], fields: dict[str, str]) -> None:
    rows = convert(question(*dates, **fields))
    assert rows.request["user_id"] == "q"
    assert rows.request["as_of"] is None
    others = convert(question("2023-06", "2023-07", "2023-07", id="other", user_id="ann", date="2023-07"))
    assert visible(rows, rows.behaviors + others.behaviors) == ["00000:p0", "00001:p1"]


def test_an_empty_profile_is_allowed() -> None:
    rows = convert(question(user_id="ann", date="2023-07"))
    assert rows.behaviors == []
    assert (rows.request["user_id"], rows.request["as_of"]) == ("ann", datetime(2023, 7, 1, tzinfo=UTC))


def test_integer_ids_become_strings() -> None:
    item = {"id": 7, "title": "T", "abstract": "A"}
    rows = convert(question(id=12, user_id=3, date="2020", profile=[item | {"date": 2019}]))
    assert (rows.request["request_id"], rows.request["user_id"]) == ("12", "3")
    assert rows.behaviors[0]["behavior_id"] == "7"


def test_a_profile_without_a_place_in_time_keeps_its_order_and_its_repeated_items() -> None:
    ids = [str(n) for n in (9, 10, 2, 10, 11, *range(100, 90, -1))]
    profile = [{"id": one, "title": f"T{n}", "abstract": "A"} for n, one in enumerate(ids)]
    rows = convert(question(profile=profile))
    in_store = sorted(rows.behaviors, key=lambda one: one["behavior_id"])  # as a store sorts undated behaviors
    assert [one["behavior_id"].split(":")[1] for one in in_store] == ids
    assert [one["text"] for one in in_store] == [f"T{n} A" for n in range(len(ids))]
    assert rows.rejects == []


def test_a_profile_that_is_dated_in_part_keeps_its_order() -> None:
    rows = convert(question("2014", "soon", None, "2012", date="never"))
    assert [one["timestamp"] for one in rows.behaviors] == [None] * 4
    assert (rows.n_unreadable_dates, rows.rejects, rows.request["as_of"]) == (2, [], None)


def test_a_repeated_item_of_a_placed_question_is_one_behavior() -> None:
    items = [{"id": "7", "title": title, "abstract": "b", "date": 2014} for title in ("a", "a", "other")]
    rows = convert(question(user_id="ann", date="2015", profile=items))
    assert [(one["behavior_id"], one["text"]) for one in rows.behaviors] == [("7", "a b")]
    assert rows.rejects == ["profile item 2: duplicate id '7', other text"]


def test_only_bad_profile_items_are_rejected_each_with_a_reason() -> None:
    good = {"id": "1", "title": "T", "abstract": "A"}
    bad = [
        "text",
        {"title": "T", "abstract": "A"},
        {"id": "2", "title": "T"},
        {"id": "3", "title": "T", "abstract": None},
        {"id": "4", "title": " ", "abstract": ""},
    ]
    rows = convert(question(profile=[good, *bad, {**good, "id": "9"}]))
    assert [one["behavior_id"] for one in rows.behaviors] == ["00000:1", "00006:9"]
    assert [reason.split(":")[0] for reason in rows.rejects] == [f"profile item {n}" for n in range(1, 6)]
    for reason, part in zip(rows.rejects, ["object", "'id'", "'abstract'", "'abstract'", "blank"], strict=True):
        assert part in reason


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (["a list"], "must be an object"),
        ({"id": None}, "'id' must be"),
        ({"id": True}, "'id' must be"),
        ({"input": 3}, "input must be a string"),
        ({"input": "Write a title."}, "does not belong to LaMP_5"),
        ({"input": "abstract of a paper:  \n"}, "does not belong to LaMP_5"),
        ({"profile": None}, "profile must be a list"),
        ({"user_id": ["ann"]}, "'user_id' must be"),
    ],
)
def test_a_malformed_question_is_refused_with_a_reason(bad: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        convert(question(**bad) if isinstance(bad, dict) else bad)


@pytest.mark.parametrize(("name", "gold"), [("LaMP_1", "[3]"), ("LaMP_2", "Comedy"), ("LaMP_3", "6")])
def test_a_gold_must_be_a_label_of_the_task(name: str, gold: str) -> None:
    prompt = next(prompt for task, _, _, prompt, _, _ in OFFICIAL if task == name)
    with pytest.raises(InputError, match="gold"):
        question_to_rows(TASKS[name], {"id": "1", "input": prompt, "profile": []}, gold)


def test_a_blank_gold_of_a_label_is_kept_as_the_official_scorer_counts_it() -> None:
    prompt = next(prompt for task, _, _, prompt, _, _ in OFFICIAL if task == "LaMP_1")
    question = {"id": "1", "input": prompt, "profile": []}
    assert question_to_rows(TASKS["LaMP_1"], question, " ").request["target"] == " "


def read(data: bytes) -> list[Any]:
    return list(read_questions(io.BytesIO(data), name="questions.json"))


def test_questions_equal_those_of_the_json_module() -> None:
    questions = [question("2014", 2014, None, extra={"a": [1.5, True, {}]}), "text", 3, [], {"é\n": "😀"}]
    assert read(json.dumps(questions, indent=1).encode()) == questions


@pytest.mark.parametrize("length", range(-14, 15))
def test_half_a_surrogate_becomes_the_replacement_character_wherever_a_read_ends(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lamp_files, "_READ_BYTES", 64)
    parts = ["\\ud83d", "\\udc00", "\\ud83d\\ud83d", "\\ud83d\\ude00", "\\\\ud83d", "\\\\\\ud83d", "\\n", "\\u00e9"]
    for part in parts:
        data = f'["{"x" * (62 - length)}{part}{part}", {{"{part}": "{part}"}}]'
        expected = json.loads(data, object_pairs_hook=lambda pairs: {_replaced(k): _replaced(v) for k, v in pairs})
        assert read(data.encode()) == [_replaced(expected[0]), expected[1]]


def _replaced(text: str) -> str:
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def test_questions_come_one_at_a_time() -> None:
    class Endless:
        chunk = b"["

        def read(self, size: int) -> bytes:
            if not size:  # the parser first reads nothing, to see whether it gets bytes
                return b""
            chunk, self.chunk = self.chunk, b'{"id": "1"},' * 1000
            return chunk

    questions = read_questions(Endless(), name="endless")  # type: ignore[arg-type]
    assert [next(questions) for _ in range(5000)][-1] == {"id": "1"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"id,input\n", "cannot be read as JSON"),
        (b'{"task": "LaMP_5", "golds": []}', "not a LaMP questions file"),
        (b'"text"', "not a LaMP questions file"),
        (b'[{"id": "1"}, {"id": "2', "cannot be read after 1 questions"),
        (b'[{"id": "1"}] [', "cannot be read after 1 questions"),
        (b'[{"id": "\xff"}]', "cannot be read as JSON"),
        (b"[" * 1_000_000, "nest deeper"),
    ],
)
def test_a_file_that_is_not_a_list_of_questions_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=f"questions.json.*{message}|{message}"):
        read(data)


def golds(outputs: Any) -> dict[str, str]:
    data = outputs if isinstance(outputs, bytes) else json.dumps(outputs).encode()
    return read_golds(io.BytesIO(data), LAMP_5, name="outputs.json")


def test_golds_are_answers_by_id() -> None:
    outputs = {"task": "LaMP_5", "golds": [{"id": "1", "output": "A"}, {"id": 2, "output": "B"}]}
    assert golds(outputs) == {"1": "A", "2": "B"}


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (b"[", "cannot be read as JSON"),
        (b'{"task": "LaMP_5", "golds": []}}', "cannot be read as JSON"),
        ([], "not a LaMP outputs file"),
        ({"task": "LaMP_5"}, "not a LaMP outputs file"),
        ({"task": "LaMP_4", "golds": []}, "has the task 'LaMP_4', not 'LaMP_5'"),
        ({"task": "LaMP_5", "golds": [{"id": "1"}]}, "gold 0"),
        ({"task": "LaMP_5", "golds": [{"output": "A"}]}, "'id' must be"),
        (
            {"task": "LaMP_5", "golds": [{"id": "1", "output": "A"}, {"id": 1, "output": "A"}]},
            "duplicate id '1'",
        ),
    ],
)
def test_an_outputs_file_of_another_task_or_format_is_refused(outputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        golds(outputs)


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_written_in_the_lamp_format_and_read_back(task: str) -> None:
    answers = {"310": "[1]", "12": 'two\nlines, "quotes" and 👍', "7": ""}
    written = outputs_json(TASKS[task], answers)
    assert lamp_form.read(written, task) == answers == read_golds(io.BytesIO(written), TASKS[task], name="outputs.json")


@pytest.mark.parametrize(
    "data",
    [
        b'{"task": "LaMP_2", "golds": [{"id": "1", "output": "x"}]}',
        b'{"task": "LaMP_1", "golds": [{"id": 1, "output": "x"}]}',
        b'{"task": "LaMP_1", "golds": [{"id": "1", "output": "x"}, {"id": "1", "output": "y"}]}',
        b'{"task": "LaMP_1", "golds": [{"id": "1", "output": "x", "score": 1}]}',
        b'{"task": "LaMP_1", "golds": []}',
    ],
)
def test_the_strict_reader_is_strict(data: bytes) -> None:
    with pytest.raises(AssertionError):
        lamp_form.read(data, "LaMP_1")


@pytest.mark.parametrize(
    ("task", "item", "text"),
    [
        ("LaMP_2", {"description": "A robot falls in love.", "tag": "romance"}, "A robot falls in love. romance"),
        ("LaMP_3", {"text": "Broke at once.", "score": "1"}, "Broke at once. 1"),
        ("LaMP_5", {"title": "Attention", "abstract": "We attend."}, "Attention We attend."),
    ],
)
def test_the_label_is_in_the_text_only_with_labels(task: str, item: dict[str, Any], text: str) -> None:
    labelled = TASKS[task].with_labels()
    assert labelled.behavior_text(item) == text
    assert TASKS[task].behavior_text(item) == " ".join(item[field] for field in TASKS[task].behavior_fields)
    assert labelled.metric == TASKS[task].metric
    if labelled != TASKS[task]:
        with pytest.raises(InputError, match=f"'{TASKS[task].label_field}' must be a string"):
            labelled.behavior_text({name: item[name] for name in TASKS[task].behavior_fields})
