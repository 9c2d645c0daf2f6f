"""What the cards say about each generator, checked on the text that it makes."""

import itertools
import json
import os
import re
import sys
from os.path import commonpath
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from lcjax.eval.budget import BudgetError, Draft, Fitter, prompt_ids, truncate_text
from lcjax.eval.haystack import insert_at, load_haystack, split_sentences
from lcjax.eval.passkey_texts import PasskeyTexts
from lcjax.eval.tasks import giraffe, helmet, helmet_documents, leval, ruler
from lcjax.eval.tasks import needle_threading as threads
from lcjax.eval.tasks.babilong import BabiLong
from lcjax.eval.tasks.copy_recall import PASSAGE, plants
from lcjax.eval.tasks.longwriter import LongWrite
from lcjax.eval.tasks.passkey import Passkey
from lcjax.eval.tasks.rows import RowError, members, read_rows
from lcjax.eval.tasks.worlds import WORLDS
from tests.eval_suites import fixtures
from tests.eval_suites.tokens import chatty, plain, write_rows


def context(draft: Draft) -> dict:
    """The JSON object of a Needle Threading prompt."""
    return json.loads(draft.body.split("\n")[1])


# Needle Threading


@pytest.mark.parametrize(
    "task",
    [
        threads.SingleNeedle(),
        threads.MultiNeedle(needles=7),
        threads.ConditionalNeedle(needles=7, clustered=True),
        threads.SingleThread(length=6),
        threads.MultiThread(threads=3, length=5, direction="backward"),
    ],
    ids=lambda task: task.name,
)
def test_threading_haystacks_have_eighty_characters_a_pair(task):
    draft = task.draft(Random(1), 40, 0)
    assert len(draft.body.split("\n")[1]) == 80 * 40
    assert len(context(draft)) == 40, "no key is there twice"


def test_the_first_threading_haystack_is_that_of_random_0():
    draft = threads.SingleNeedle().draft(Random(0), 25, 0)
    text = draft.body.split("\n")[1]
    assert len(text) == 2000
    assert text.startswith('{"e3e70682-c209-4cac-629f-6fbed82c07cd": "')


@pytest.mark.parametrize("direction", ["forward", "backward", "random"])
def test_threads_reach_their_answers_in_as_many_steps(direction):
    task = threads.MultiThread(threads=3, length=6, direction=direction)
    draft = task.draft(Random(5), 60, 0)
    table, keys = context(draft), list(context(draft))
    starts = re.findall(r'"([^"]+)"', draft.body.split("\n")[2])
    assert len(starts) == 3
    for start, answer in zip(starts, draft.references, strict=True):
        places, here = [], start
        while here in table:
            places.append(keys.index(here))
            here = table[here]
        assert here == answer
        assert len(places) == 6
        if direction != "random":
            assert places == sorted(places, reverse=direction == "backward")


def test_conditional_needles_are_the_only_keys_with_the_symbol():
    draft = threads.ConditionalNeedle(needles=9).draft(Random(2), 50, 0)
    marked = {key: value for key, value in context(draft).items() if "*" in key}
    assert tuple(marked.values()) == draft.references
    assert all(len(key) == 36 for key in marked)


def test_clustered_needles_are_neighbours():
    draft = threads.MultiNeedle(needles=6, clustered=True).draft(Random(2), 50, 0)
    values = list(context(draft).values())
    first = values.index(draft.references[0])
    assert tuple(values[first : first + 6]) == draft.references


def test_branched_threads_have_one_way_through():
    draft = threads.BranchedThread(length=5, branches=3).draft(Random(3), 40, 0)
    table = context(draft)
    here, hops = re.findall(r'"([^"]+)"', draft.body.split("\n")[2])[0], 1
    while isinstance(table[here], list):
        assert len(table[here]) == 3
        (here,) = [option for option in table[here] if option in table]
        hops += 1
    assert (table[here], hops) == (draft.references[0], 5)


# RULER


def test_needles_lie_at_their_depths_and_nowhere_else():
    for task in ruler.ruler()[:8]:
        draft = task.draft(Random(7), 400, 0)
        for value in draft.references:
            assert draft.body.count(value) == 1
        assert draft.metadata["depths"] == sorted(draft.metadata["depths"])
        if len(draft.references) > 1:
            assert "depth" not in draft.metadata
        else:
            place = draft.body.index(draft.references[0]) / len(draft.body)
            assert draft.metadata["depth"] == pytest.approx(place, abs=0.12)


def test_variable_tracking_is_one_chain():
    draft = ruler.VariableTracking().draft(Random(1), 30, 0)
    text = draft.body.split("hidden in the next text too.")[1]
    found = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", text)
    assert len(found) == 5
    assert found[0][1].isdigit()
    assert [source for _, source in found[1:]] == [name for name, _ in found[:-1]]
    assert draft.references == tuple(name for name, _ in found)


def test_common_words_are_the_most_common():
    for task, often in ((ruler.CommonWords(), 30), (ruler.CommonWords(often=6, rarely=1), 6)):
        draft = task.draft(Random(1), 50, 0)
        words = re.findall(r"\d+\. (\S+)", draft.body.split("another list.")[1])
        counts = {word: words.count(word) for word in set(words)}
        assert {word for word, count in counts.items() if count == often} == set(draft.references)
        assert max(count for word, count in counts.items() if word not in draft.references) < often


def test_frequent_words_follow_the_card():
    assert ruler.rank_counts(5461)[:4] == [3319, 829, 368, 207]
    draft = ruler.FrequentWords().draft(Random(1), 5461, 0)
    words = draft.body.split("\n\n")[1].split()
    assert [words.count(word) for word in ("...", *draft.references)] == [3319, 829, 368, 207]


def test_a_chat_model_gets_the_answer_prefix_after_its_tag():
    item = next(iter(ruler.ruler(num_examples=1)[0].examples(chatty(), 2000, 0)))
    text = chatty().decode(prompt_ids(chatty(), item.prompt))
    assert re.search(r"<\|assistant\|>The secret number of \S+ in the text is$", text)


# BABILong


@pytest.mark.parametrize("name", WORLDS)
def test_worlds_are_answered_by_their_supporting_facts(name):
    for seed in range(60):
        story = WORLDS[name](Random(seed))
        assert story.answer in story.labels
        assert story.answer.lower() not in story.question.lower()
        support = " ".join(story.facts[i] for i in story.support)
        assert story.answer in support
        assert len(story.support) >= {"qa1": 1, "qa2": 1, "qa3": 2, "qa4": 1, "qa5": 1}[name]


def replay(facts: tuple[str, ...]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Where people are, and every place of every thing in order, from the text of the facts alone."""
    place: dict[str, str] = {}
    held: dict[str, str] = {}
    trail: dict[str, list[str]] = {}

    def note(thing: str, where: str) -> None:
        if trail.setdefault(thing, [])[-1:] != [where]:
            trail[thing].append(where)

    for fact in facts:
        person, words = fact.split()[0], fact.rstrip(".").split()
        if words[-1] in ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office"):
            place[person] = words[-1]
            for thing in [t for t, p in held.items() if p == person]:
                note(thing, words[-1])
        elif words[1] in ("took", "got", "grabbed", "picked"):
            held[words[-1]] = person
            note(words[-1], place[person])
        else:
            assert held.pop(words[-1]) == person
            note(words[-1], place[person])
    return place, trail


def test_an_independent_reading_of_the_facts_gives_the_same_answers():
    for seed in range(200):
        one, two, three = (WORLDS[name](Random(seed)) for name in ("qa1", "qa2", "qa3"))
        assert replay(one.facts)[0][one.question.split()[-1].rstrip("?")] == one.answer
        assert replay(two.facts)[1][two.question.split()[-1].rstrip("?")][-1] == two.answer
        thing, last = re.findall(r"the (\w+)", three.question)
        assert replay(three.facts)[1][thing][-2:] == [three.answer, last]


def test_babilong_keeps_the_order_of_the_facts():
    draft = BabiLong(question="qa2").draft(Random(4), 50, 0)
    text = draft.body.split("<text>")[1]
    places, at = [], 0
    for fact in draft.metadata["facts"]:
        at = text.index(fact, at)
        places.append(at)
        at += len(fact)
    assert places == sorted(places)
    bare = BabiLong(question="qa2").draft(Random(4), 0, 0)
    assert " ".join(bare.metadata["facts"]) in bare.body, "without filler it is plain bAbI"


# Giraffe


def test_numbers_are_altered_everywhere_and_stay_like_themselves():
    document = "Founded in 1823, with 4521 people; 18230 is another number. Since 1823."
    changed, year = giraffe.alter_numbers(document, "1823", Random(1))
    assert year != "1823"
    assert abs(int(year) - 1823) <= 10
    assert changed == document.replace("in 1823,", f"in {year},").replace("Since 1823.", f"Since {year}.")
    _, people = giraffe.alter_numbers(document, "4521", Random(1))
    assert len(people) == 4
    with pytest.raises(ValueError, match="does not occur"):
        giraffe.alter_numbers(document, "77", Random(1))
    with pytest.raises(ValueError, match="whole number"):
        giraffe.alter_numbers(document, "many", Random(1))


def test_question_and_answer_take_turns_in_their_places():
    drafts = [giraffe.FreeFormQa().draft(Random(i), 200, i) for i in range(6)]
    assert [d.metadata["place"] for d in drafts] == ["start", "start", "anywhere", "anywhere", "end", "end"]
    assert [d.metadata["question_first"] for d in drafts] == [False, True] * 3
    assert all(d.metadata["depth"] <= 0.1 for d in drafts[:2])
    assert all(d.metadata["depth"] >= 0.9 for d in drafts[4:])


# HELMET


def test_shots_come_in_balanced_rounds_with_new_numbers():
    first, second = (helmet.ManyShot(classes=4).draft(Random(seed), 12, 0) for seed in (1, 2))
    labels = [re.findall(r"label: (\d+)", draft.body) for draft in (first, second)]
    for found in labels:
        for begin in range(0, 12, 4):
            assert sorted(found[begin : begin + 4]) == ["0", "1", "2", "3"], "a round has every class once"
    assert sorted(first.metadata["labels"].values()) == ["0", "1", "2", "3"], "a bijection"
    assert len({tuple(helmet.ManyShot().draft(Random(s), 8, 0).metadata["labels"].values()) for s in range(9)}) > 5


def test_gold_passages_step_over_six_depths(tmp_path):
    task = helmet.Rag(source=fixtures.rag(tmp_path / "rag.jsonl"))
    assert [round(task.draft(Random(1), 50, i).metadata["depth"], 1) for i in range(6)] == [0, 0.2, 0.4, 0.6, 0.8, 1.0]


# L-Eval


def test_length_instruction_only_touches_open_tasks(tmp_path):
    source = fixtures.leval(tmp_path)
    for name, asked in (("gov_report_summ", True), ("tpo", False)):
        on, off = (
            next(iter(leval.LEval(source=source, task=name, length_instruction=flag).examples(plain(), 9000, 0))).prompt
            for flag in (True, False)
        )
        assert ("in about 6 words" in on) is asked
        assert "in about" not in off


def test_instructions_of_a_document_share_its_prefix(tmp_path):
    first, second = leval.LEval(source=fixtures.leval(tmp_path), task="quality").examples(plain(), 9000, 0)
    same = commonpath([first.prompt, second.prompt])
    assert fixtures.TEXT.strip() in same
    assert first.metadata["prefix_group"] == second.metadata["prefix_group"] != ""


@pytest.mark.data
def test_leval_itself():
    folder = os.environ.get("LCJAX_LEVAL", "")
    if not Path(folder).is_dir() or not folder:
        pytest.skip("needs L-Eval: set LCJAX_LEVAL to the folder with its JSON lines")
    for task in leval.leval(folder, split="all", limit=2):
        items = list(task.examples(plain(), 120_000, 0))
        assert len(items) == 2
        for item in items:
            for answer, wanted in ((task.ideal(item), 1.0), ("", 0.0)):
                score = task.score(item, answer)
                score = score if isinstance(score, float) else next(iter(score.values()))
                assert score == pytest.approx(wanted), (task.name, item.id)


# Budgets and truncation


@pytest.mark.parametrize("policy", ["head", "tail", "middle"])
@pytest.mark.parametrize("tokenizer", [plain, chatty], ids=["plain", "chat"])
def test_named_policies_cut_the_document_and_nothing_else(policy, tokenizer):
    text = " ".join(f"word{i}" for i in range(2000))

    def build(document: str) -> Draft:
        return Draft(f"Instruction first.\n{document}\nQuestion last?", ("x",), 50)

    draft, tokens = truncate_text(tokenizer(), text, build, 3000, bool(tokenizer().chat_template), policy, "it")
    assert 2960 <= tokens + 50 <= 3000
    assert draft.body.startswith("Instruction first.\n")
    assert draft.body.endswith("\nQuestion last?")
    assert ("word0 " in draft.body, "word1999" in draft.body) == {
        "head": (True, False),
        "tail": (False, True),
        "middle": (True, True),
    }[policy]
    assert draft.metadata["truncation"] == policy
    assert draft.metadata["kept"] < draft.metadata["of"]


def test_without_a_policy_a_long_document_is_an_error(tmp_path):
    tight = leval.LEval(source=fixtures.leval(tmp_path), task="quality", truncation="error")
    with pytest.raises(BudgetError, match=r"leval_quality-0-0 needs .* budget is 400; raise the budget or name"):
        list(tight.examples(plain(), 400, 0))
    dropped = leval.LEval(source=fixtures.leval(tmp_path), task="quality", truncation="drop")
    assert list(dropped.examples(plain(), 400, 0)) == []
    with pytest.raises(BudgetError, match="without its document"):
        list(leval.LEval(source=fixtures.leval(tmp_path), task="quality", truncation="head").examples(plain(), 90, 0))


def test_fitting_stops_when_tokens_jump():
    """Units of very different sizes: still never over, and the next unit would not have fitted."""
    sizes = [1, 500, 3, 900, 2, 2, 700, 1, 1, 400] * 20

    def build(units: int) -> Draft:
        return Draft("x" * sum(sizes[:units]), ("y",), 10)

    for budget in (200, 1000, 3000, 9000):
        fitter = Fitter(plain(), budget, chat=False)
        draft, tokens = fitter.fit(build, "jumps", maximum=200)
        used = tokens + draft.max_new_tokens
        units = next(n for n in range(201) if sum(sizes[:n]) == tokens)
        over = units + 1 <= 200 and sum(sizes[: units + 1]) + draft.max_new_tokens > budget
        assert used <= budget
        assert over or budget - used <= 0.01 * budget


def test_an_answer_longer_than_its_room_gets_more():
    item = next(iter(LongWrite(lengths=(100,)).examples(plain(), 2000, 0)))
    assert item.max_new_tokens >= len("word ") * 100 - 1


def test_a_million_tokens():
    import time

    task = ruler.ruler(num_examples=1)[1]
    load_haystack("python")
    began = time.process_time()
    item = next(iter(task.examples(plain(), 1_000_000, 0)))
    seconds = time.process_time() - began
    assert 990_000 <= len(prompt_ids(plain(), item.prompt)) + item.max_new_tokens <= 1_000_000
    assert seconds < 10


# Passkey, haystacks, rows, copy recall


def test_passkeys_lie_at_their_depths_and_are_said_twice():
    for index, depth in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        draft = Passkey().draft(Random(index), 40, index)
        (key,) = draft.references
        lines = draft.body.split("\n")
        place = next(i for i, line in enumerate(lines) if key in line)
        assert (place - 1) / 40 == draft.metadata["depth"] == depth
        assert draft.body.count(key) == 2
        assert len(key) == 5
    with pytest.raises(ValueError, match=r"depths must lie in 0..1, got 2"):
        Passkey(depths=(0.5, 2.0))


def test_training_texts_ask_for_every_named_key():
    text = PasskeyTexts(least=30, most=40, named=12).open("")[3]
    stated = re.findall(r"^The pass key of (\S+) is (\d+)\. Remember", text, re.MULTILINE)
    asked = re.findall(r"What is the pass key of (\S+)\?\nThe pass key of (\S+) is (\d+)\.$", text, re.MULTILINE)
    assert len({name for name, _ in stated}) == 12
    assert [name for name, _ in stated] != [name for name, _, _ in asked]
    assert sorted(stated) == sorted((name, key) for _, name, key in asked)
    assert all(question == name for question, name, _ in asked)
    answer = re.search(r"What is the pass key\?\nThe pass key is (\d+)\.$", text, re.MULTILINE)
    assert text.index("What is the pass key?") < text.index("What is the pass key of")
    assert re.findall(r"^The pass key is (\d+)\. Remember it\. The pass key is (\d+)\.$", text, re.MULTILINE) == [
        (answer[1], answer[1])
    ]
    with pytest.raises(ValueError, match=r"PasskeyTexts\.named is -1"):
        PasskeyTexts(named=-1)


def test_sentences_keep_their_quotes_and_are_never_long():
    text = 'She said: "Go." He went.\n\nThird one? Yes! ' + "word " * 150
    found = split_sentences(text)
    assert found[:4] == ['She said: "Go."', "He went.", "Third one?", "Yes!"] or found[2] == "Third one?"
    assert max(len(sentence.split()) for sentence in load_haystack().sentences) <= 40
    assert insert_at(["a", "b"], ["x", "y"], [0, 2]) == ["x", "a", "b", "y"]


def test_haystacks_repeat_and_say_what_they_are(tmp_path):
    (tmp_path / "b.txt").write_text("Second book. It ends.")
    (tmp_path / "a.txt").write_text("First book. It begins.")
    haystack = load_haystack(str(tmp_path))
    assert haystack.sentences == ("First book.", "It begins.", "Second book.", "It ends.")
    assert haystack.take_words(11) == [*haystack.sentences, "First book.", "It"]
    assert len(haystack.fingerprint) == 64
    with pytest.raises(FileNotFoundError, match="no text file"):
        load_haystack(str(tmp_path / "none"))


def test_rows_name_what_is_wrong(tmp_path):
    good = write_rows(tmp_path / "good.jsonl", [{"a": 1}])
    assert read_rows(good, ("a",)) == [{"a": 1}]
    assert members(str(tmp_path)) == ["good.jsonl"]
    with pytest.raises(RowError, match=r"good.jsonl, row 1: the field 'b' is missing; it has a"):
        read_rows(good, ("b",))
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": ')
    with pytest.raises(RowError, match=r"bad.jsonl, line 2: no JSON"):
        read_rows(str(tmp_path / "bad.jsonl"), ("a",))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RowError, match="holds no rows"):
        read_rows(str(tmp_path / "empty.jsonl"), ("a",))
    (tmp_path / "bad.json").write_text('[{"a": 1}, {"a": ]')
    with pytest.raises(RowError, match=r"bad.json: no JSON \(.*column 18\)"):
        read_rows(str(tmp_path / "bad.json"), ("a",))
    (tmp_path / "words.json").write_text('["a"]')
    with pytest.raises(RowError, match=r"words.json, row 1: a JSON object is wanted, got str"):
        read_rows(str(tmp_path / "words.json"), ("a",))
    with pytest.raises(RowError, match=r"none.jsonl, row 1: `answers` is empty"):
        read_rows(write_rows(tmp_path / "none.jsonl", [{"answers": []}]), ("answers",))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_rows(str(tmp_path / "absent.jsonl"), ())


def test_questions_with_and_without_options_are_two_tasks(tmp_path):
    free, choice = fixtures.long_qa(tmp_path / "free.jsonl"), fixtures.long_choice(tmp_path / "choice.jsonl")
    for task, message in (
        (helmet_documents.LongQa(source=choice), r"row 1 has `options`: give it as helmet\.longqa_choice"),
        (helmet_documents.LongChoice(source=free), "the field 'options' is missing"),
    ):
        with pytest.raises(RowError, match=message):
            list(task.examples(plain(), 9000, 0))


def test_rows_come_from_named_sets_of_the_internet(tmp_path, monkeypatch):
    file = write_rows(tmp_path / "set.jsonl", [{"a": 1}])
    asked = []
    hub = SimpleNamespace(hf_hub_download=lambda *names, **kind: asked.append((*names, kind)) or file)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert read_rows("hf:org/name/folder/set.jsonl", ("a",)) == [{"a": 1}]
    assert asked == [("org/name", "folder/set.jsonl", {"repo_type": "dataset"})]
    sets = SimpleNamespace(data_source=lambda name, split: [{"name": name.encode(), "split": split}])
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", sets)
    assert read_rows("tfds:squad/v1:train", ("name",)) == [{"name": "squad/v1", "split": "train"}]
    with pytest.raises(RowError, match=r"tfds:squad, row 1: the field 'question' is missing"):
        read_rows("tfds:squad", ("question",))


def test_plants_are_copies_at_their_depth(tmp_path):
    (tmp_path / "a.txt").write_text("alpha " * 3000)
    paragraphs = [f"Paragraph {i} " + "of many words " * 9 for i in range(60)]
    (tmp_path / "b.txt").write_text("\n \n".join(paragraphs))
    rows = plants(plain(), 1000, count=4, filler=str(tmp_path / "a.txt"), passages=str(tmp_path / "b.txt"))
    assert rows.shape == (4, 1000)
    for row in rows:
        passage = row[-PASSAGE:]
        places = [i for i in range(1000 - PASSAGE) if (row[i : i + PASSAGE] == passage).all()]
        assert len(places) == 1
        assert places[0] == pytest.approx(0.25 * 1000, abs=40)
        assert bytes(row[places[0] - 2 : places[0]].tolist()) == b"\n\n"
        assert bytes(passage.tolist()).startswith(b"Paragraph ")
    assert len({bytes(row[-PASSAGE:].tolist()) for row in rows}) > 1
    assert (
        rows == plants(plain(), 1000, count=4, filler=str(tmp_path / "a.txt"), passages=str(tmp_path / "b.txt"))
    ).all()
    (tmp_path / "a.txt").write_text("alpha ")
    with pytest.raises(ValueError, match=r"a.txt' has 6 tokens; a passage takes 64"):
        plants(plain(), 1000, count=1, filler=str(tmp_path / "b.txt"), passages=str(tmp_path / "a.txt"))
    with pytest.raises(BudgetError, match="copy_recall needs more than 100"):
        plants(plain(), 100, count=1, filler="python", passages="python")


def test_names_are_not_shared_between_tasks():
    tasks = [*ruler.ruler(), *threads.needle_threading(), *giraffe.giraffe(), helmet.JsonKv(), helmet.ManyShot()]
    assert all(count == 1 for count in map([task.name for task in tasks].count, [task.name for task in tasks]))
    assert [task.name for task in itertools.islice(tasks, 3)] == ["niah_single_1", "niah_single_2", "niah_single_3"]
