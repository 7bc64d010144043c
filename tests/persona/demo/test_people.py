"""The demo's people: their notes imply the answers and do not name them, and nothing else gives them away."""

import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from persona.demo import people as demo
from persona.demo.facets import FACETS
from persona.inputs import histories, requests
from persona.inputs.reader import read_split
from persona.inputs.records import Records
from persona.inputs.splits import plan_splits

SMALL = demo.Sizes(train=40, validation=5, test=10)


def every_note() -> list[str]:
    return [note for facet in FACETS for notes in facet.notes.values() for note in notes]


def through_a_file(table: pa.Table, path: Path) -> Records:
    """The table, as read by a job."""
    pq.write_table(table, path)
    (split,) = plan_splits(str(path), flag="--in")
    (records,) = read_split(split)
    return records


def test_people_depend_only_on_the_seed():
    assert demo.histories(seed=3, sizes=SMALL).equals(demo.histories(seed=3, sizes=SMALL))
    assert demo.requests("test", seed=3, sizes=SMALL).equals(demo.requests("test", seed=3, sizes=SMALL))
    assert not demo.histories(seed=3, sizes=SMALL).equals(demo.histories(seed=4, sizes=SMALL))
    assert not demo.requests("test", seed=3, sizes=SMALL).equals(demo.requests("test", seed=4, sizes=SMALL))


def test_no_row_is_rejected_by_the_jobs(tmp_path):
    written, asked = demo.histories(sizes=SMALL), demo.requests("train", sizes=SMALL)
    good, rejects = histories.validate(through_a_file(written, tmp_path / "notes.parquet"), histories.Columns(), 4)
    assert (good.num_rows, rejects.num_rows) == (written.num_rows, 0)
    good, rejects = requests.validate(through_a_file(asked, tmp_path / "asked.parquet"), 4, needs_target=True)
    assert (good.num_rows, rejects.num_rows) == (asked.num_rows, 0)


def test_parts_share_no_user_and_all_users_have_a_history_and_a_request_for_each_facet():
    users = {part: Counter(demo.requests(part, sizes=SMALL)["user_id"].to_pylist()) for part in get_args(demo.Part)}
    assert [len(counts) for counts in users.values()] == [SMALL.train, SMALL.validation, SMALL.test]
    assert len(set(chain(*users.values()))) == SMALL.train + SMALL.validation + SMALL.test
    assert set(chain(*(counts.values() for counts in users.values()))) == {len(FACETS)}
    notes = Counter(demo.histories(sizes=SMALL)["user_id"].to_pylist())
    assert notes.keys() == set(chain(*users.values()))
    assert set(notes.values()) == {len(FACETS) * SMALL.notes_a_facet + SMALL.small_talk}


def test_keys_are_unique_and_notes_are_in_chronological_order():
    written = demo.histories(sizes=SMALL)
    assert pc.count_distinct(written["behavior_id"]).as_py() == written.num_rows
    times = {}
    for row in written.to_pylist():
        times.setdefault(row["user_id"], []).append(row["timestamp"])
    assert all(moments == sorted(set(moments)) for moments in times.values())
    asked = pa.concat_tables(demo.requests(part, sizes=SMALL) for part in get_args(demo.Part))
    assert pc.count_distinct(asked["request_id"]).as_py() == asked.num_rows


@pytest.mark.parametrize("answer", [answer for facet in FACETS for answer in facet.notes])
def test_no_note_and_no_request_names_an_answer(answer):
    noun = answer.split()[-1]
    texts = [*every_note(), *(request for facet in FACETS for request in facet.requests)]
    assert not [text for text in texts if re.search(rf"\b{noun}\b", text.lower())]


def test_answers_to_a_facet_are_equally_likely_and_independent_of_other_facets():
    everyone = demo.people(sizes=demo.Sizes(train=3000, validation=0, test=0))
    for facet in FACETS:
        counts = Counter(person.answers[facet.name] for person in everyone)
        expected = len(everyone) / len(facet.notes)
        deviation = (expected * (1 - 1 / len(facet.notes))) ** 0.5  # of a binomial
        assert all(abs(counts[answer] - expected) < 4 * deviation for answer in facet.notes)
    first, second = FACETS[0], FACETS[-1]
    pairs = Counter((person.answers[first.name], person.answers[second.name]) for person in everyone)
    expected = len(everyone) / (len(first.notes) * len(second.notes))
    assert all(abs(pairs[a, b] - expected) < 5 * expected**0.5 for a in first.notes for b in second.notes)


def test_one_wording_of_each_answer_is_used_only_outside_train():
    train = set(demo.requests("train")["user_id"].to_pylist())
    written = demo.histories().to_pylist()
    ours = " ".join(row["text"] for row in written if row["user_id"] in train)
    others = " ".join(row["text"] for row in written if row["user_id"] not in train)
    # Names replace {friend} in a wording, so the longest part without it identifies the wording.
    kept = [max(notes[0].split("{friend}"), key=len) for facet in FACETS for notes in facet.notes.values()]
    assert not [wording for wording in kept if wording in ours]
    assert len([wording for wording in kept if wording in others]) > len(kept) / 2


def test_wordings_are_all_different():
    assert len(set(every_note())) == len(every_note())


def test_notes_read_well():
    for text in demo.histories(sizes=SMALL)["text"].to_pylist():
        assert text[-1] in ".?!" and text[0].isupper() and "{" not in text and "  " not in text
