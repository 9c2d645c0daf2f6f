"""Every metric on cases worked by hand."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from lcjax.eval.contour import effective_length, effective_lengths, longest_passing, relative_length, weighted_score
from lcjax.eval.metrics import METRICS, ngram, text
from lcjax.eval.metrics.citation import citation_scores
from lcjax.eval.metrics.judge import HttpJudge, JudgeError, LocalJudge, ask_scores, quality_score
from lcjax.eval.metrics.length import count_words, length_score
from lcjax.eval.metrics.ranking import ndcg, parse_ranking
from lcjax.eval.metrics.statistics import (
    bootstrap_interval,
    mean_interval,
    paired_difference,
    wilson_interval,
)
from lcjax.eval.tasks.babilong import label_score
from lcjax.eval.tasks.leval import (
    choice_score,
    code_answer,
    contained_score,
    judgement_score,
    number_score,
    parse_choice,
)
from lcjax.eval.tasks.mmlongbench import count_score, document_score, image_tokens, mirrored_accuracy

TEXT_CASES = [
    ("exact_match", "The  Mill!", ("mill",), 1.0),
    ("exact_match", "the old mill", ("mill",), 0.0),
    ("token_f1", "a cat sat on a mat", ("the cat lay on the mat",), 2 * 3 / (4 + 4)),  # cat, on, mat of 4 and 4 words
    ("token_f1", "dog", ("cat", "a dog"), 1.0),
    ("token_f1", "cat cat cat", ("cat",), 2 * 1 / (3 + 1)),
    ("all_substrings", "It is 12 and 34", ("12", "34", "56"), 2 / 3),
    ("all_substrings", "ALPHA\x00beta", ("alpha", "Beta"), 1.0),
    ("any_substring", "in New York City", ("new york", "NYC"), 1.0),
    ("normalised_substring", "It was the Mill, of Arnsby.", ("mill of arnsby",), 1.0),
    ("prefix_match", ' "abc-1" and more', ("abc-1",), 1.0),
    ("prefix_match", "The value is abc-1", ("abc-1",), 0.0),
    ("first_integer_match", "It is 42, not 17", ("42",), 1.0),
    ("first_integer_match", "line 7 holds 42", ("42",), 0.0),
    ("number_share", "Paragraph 3 or 5", ("Paragraph 3",), 0.5),
    ("number_share", "none", ("Paragraph 3",), 0.0),
    ("edit_similarity", "# note\nreturn a\nx", ("return b",), 2 * 7 / 16),
    ("edit_similarity", "```\nreturn b\n```", ("return b",), 1.0),
    ("character_f1", "磨坊，大", ("大磨坊",), 1.0),
    ("first_line_match", "\n Tuesday.\nBecause", ("Tuesday",), 1.0),
    ("rougeL", "the cat sat", ("the cat lay",), 2 / 3),
    ("rougeL", "sat cat the", ("the cat sat",), 1 / 3),
]


@pytest.mark.parametrize(("name", "answer", "references", "value"), TEXT_CASES)
def test_text_metrics(name, answer, references, value):
    assert METRICS[name](answer, references) == pytest.approx(value)


@pytest.mark.parametrize("name", METRICS)
def test_a_blank_answer_scores_nothing_and_a_reference_everything(name):
    reference = ("7 mills stand on the river Wend",)
    assert METRICS[name]("", reference) == 0.0
    if name not in ("first_integer_match", "number_share"):
        assert METRICS[name](reference[0], reference) == pytest.approx(1.0)


def test_rouge_and_bleu_by_hand():
    found = ngram.rouge_all("the cat sat on the mat", ("the cat was on the mat",))
    assert found["rouge1"] == pytest.approx(5 / 6)
    assert found["rouge2"] == pytest.approx(3 / 5)  # the-cat, on-the, the-mat of 5
    assert found["rougeL"] == pytest.approx(5 / 6)
    assert found["rouge_mean"] == pytest.approx((5 / 6 * 3 / 5 * 5 / 6) ** (1 / 3))
    # 6-, 5-, 4- and 3-gram counts by hand: 5/6, 3/5, 1/4, and smoothed 1/(2*3)
    wanted = (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    assert ngram.bleu("the cat sat on the mat", ("the cat was on the mat",)) == pytest.approx(wanted, rel=1e-6)


def test_classification_drops_parts_of_the_gold_label():
    classes = ["Individual", "Individual group", "Date"]
    assert text.classification("Individual group", ("Individual group",), classes) == 1.0
    assert text.classification("Individual group or Date", ("Individual group",), classes) == 0.5
    assert text.classification("Date", ("Individual",), classes) == 0.0


def test_ndcg_of_perfect_reversed_and_absent_rankings():
    grades = {"a": 3, "b": 2, "c": 0}
    ideal = 3 + 2 / math.log2(3)
    assert ndcg(["a", "b", "c"], grades) == pytest.approx(1.0)
    assert ndcg(["c", "b", "a"], grades) == pytest.approx((2 / math.log2(3) + 3 / 2) / ideal)
    assert ndcg([], grades) == 0.0
    assert ndcg(["a"], grades) == pytest.approx(3 / ideal)
    assert parse_ranking("Ranking: b > a > x > b", grades) == ["b", "a"]


def test_citations():
    passages = ["The mill of Arnsby was built in 1823.", "Rivers freeze in winter."]
    good = citation_scores("The mill of Arnsby was built in 1823 [1]. Rivers freeze in winter [2].", passages)
    assert good == {"citation_recall_proxy": 1.0, "citation_precision_proxy": 1.0}
    mixed = citation_scores("The mill of Arnsby was built in 1823 [1][2]. Cats sleep all day long [2].", passages)
    assert mixed["citation_recall_proxy"] == 0.5
    assert mixed["citation_precision_proxy"] == pytest.approx(1 / 3)
    assert citation_scores("", passages)["citation_recall_proxy"] == 0.0
    assert citation_scores("The mill of Arnsby was built in 1823 [9].", passages)["citation_precision_proxy"] == 0.0


@pytest.mark.parametrize(
    ("required", "produced", "score"),
    [(1000, 1000, 1), (1000, 4000, 0), (1000, 2500, 0.5), (1000, 500, 0.5), (999, 333, 0), (1000, 0, 0), (10, 90, 0)],
)
def test_length_score(required, produced, score):
    assert length_score(required, produced) == pytest.approx(score, abs=1e-9)


def test_word_counter():
    assert count_words("don't") == 2
    assert count_words("B2B") == 0
    assert count_words("one two, three.") == 3
    assert count_words("磨坊 and 水") == 4
    assert count_words("水and") == 1  # a Latin word that is glued to a character is none
    with pytest.raises(ValueError, match="at least 1 word"):
        length_score(0, 5)


def test_leval_choices():
    assert [choice_score("AC", right) for right in ("AC", "ACD", "A", "BD")] == [1.0, 0.25, 0.0, 0.0]
    assert choice_score("", "A") == 0.0
    assert choice_score("", "A", empty=0.25) == 0.25
    assert [parse_choice(answer) for answer in ("(B) A mill", "A good one is C", "B and D.", "none", "Answer: AC")] == [
        *("B", "C", "BD", "", "AC")
    ]
    assert parse_choice("none", default="A") == "A"


def test_leval_other_exams():
    assert number_score("3 + 4 = 7. The answer is 1,200 dollars in 2 years", "1200") == 1.0
    assert number_score("so 5 and then 18", "18") == 1.0
    assert number_score("18 and then 5", "18") == 0.0
    assert judgement_score("True [fact: False]", "True [fact: False]") == 1.0
    assert judgement_score("True", "True [fact: False]") == 0.5
    assert judgement_score("", "True [fact: False]") == 0.0
    assert contained_score("The topic was: the  History of mills.", "The history of mills") == 1.0
    assert contained_score("142", "42") == 0.0
    assert contained_score("it is 42.0", "42") == 1.0
    assert code_answer("so we get x. Final output: ab", "ab") == ": ab"


def test_babilong_labels():
    places = ["bathroom", "kitchen", "office"]
    assert label_score("The kitchen. Or the office", "kitchen", places, "Where is Mary?") == 1.0
    assert label_score("kitchen or office", "kitchen", places, "Where is Mary?") == 0.0
    asked = "What is north of the office?"
    assert label_score("The kitchen is north of the office", "kitchen", places, asked) == 1.0
    assert label_score("", "kitchen", places, asked) == 0.0


def test_mmlongbench_rules():
    assert image_tokens(448, 448) == 256
    assert image_tokens(449, 448) == 272
    assert count_score("[1, 2]", [3]) == 1.0
    assert count_score("none", [0]) == 1.0
    assert count_score("none", [2]) == 0.0
    assert mirrored_accuracy(0.3) == pytest.approx(0.7)
    assert document_score("12", 12) == 1.0
    assert document_score("25.1 %", 0.25) == 1.0
    assert document_score("26", 0.25) == 0.0
    assert document_score("see https://a.example/b", "https://a.example/b") == 1.0
    assert document_score("1 and 3", [1, 2]) == 0.5


def test_intervals():
    found = bootstrap_interval([0.0, 1.0] * 50)
    assert found.mean == 0.5
    assert found.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015)
    assert found == bootstrap_interval([0.0, 1.0] * 50), "the same scores give the same bounds"
    perfect = bootstrap_interval([1.0] * 20)
    assert perfect.high == 1.0
    assert perfect.low == pytest.approx(1 / (1 + 1.959964**2 / 20), rel=1e-4)  # Wilson at a share of 1
    assert wilson_interval(0.5, 100).low == pytest.approx(0.4038, abs=1e-4)
    difference = paired_difference([([0.2] * 10, [0.5] * 10)])
    assert difference == (pytest.approx(0.3), pytest.approx(0.3), pytest.approx(0.3), 10)
    with pytest.raises(ValueError, match="equal counts; got 1 and 2"):
        paired_difference([([0.2], [0.5, 0.1])])


def test_a_mean_of_tasks_counts_every_task_the_same():
    few, many = [0.0, 1.0] * 5, [0.0, 1.0] * 200
    found = mean_interval([few, many])
    assert found.mean == 0.5
    assert found.count == 410
    error = math.sqrt((0.25 / 10 + 0.25 / 400) / 4)  # of the mean of two independent means
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert mean_interval([[1.0] * 10, [1.0] * 10]) == wilson_interval(1.0, 20)
    third = mean_interval([[1.0] * 10, [1.0, 0.0] * 5, [0.0] * 10], [0.5, 0.5, 1.0])
    assert third.mean == (1 + 0.5) / 2 / 2
    assert third.high - third.low == pytest.approx(2 * 1.96 * 0.25 * math.sqrt(0.25 / 10), rel=0.1)
    one = paired_difference([([0.0] * 10, [1.0] * 10), ([0.5] * 400, [0.5] * 400)], [3.0, 1.0])
    assert one.mean == 0.75
    both = paired_difference([([0.0] * 10, [1.0] * 10), ([0.5] * 400, [0.5] * 400)])
    assert both.mean == 0.5
    with pytest.raises(ValueError, match="at least one score"):
        bootstrap_interval([])


def test_effective_length_is_log_linear():
    curve = {1000: 1.0, 2000: 0.5, 4000: 0.0}
    assert effective_length(curve, 0.75) == pytest.approx(1000 * math.sqrt(2))
    assert effective_length({1000: 0.7}, 0.75) == 0.0
    assert effective_length({1000: 0.9, 2000: 0.8}, 0.75) == 2000
    assert effective_lengths({5: curve, 2: {1000: 1.0}}) == {2: 1000.0, 5: pytest.approx(1414.2, abs=0.1)}
    assert longest_passing(curve, 0.5) == 2000
    assert relative_length({1: 0.8, 2: 0.61, 4: 0.59}) == 2
    assert weighted_score({1: 1.0, 2: 0.0}, increasing=True) == pytest.approx(1 / 3)
    assert weighted_score({1: 1.0, 2: 0.0}, increasing=False) == pytest.approx(2 / 3)


class _Handler(BaseHTTPRequestHandler):
    delay = 0.0
    reply: object = None

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(_Handler.delay)
        found = _Handler.reply or {"choices": [{"message": {"content": "echo " + asked["messages"][0]["content"]}}]}
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    server = HTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    _Handler.delay, _Handler.reply = 0.0, None
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_http_judge_answers(endpoint):
    assert HttpJudge(endpoint, "m")("hello") == "echo hello"


def test_http_judge_names_a_strange_answer(endpoint):
    _Handler.reply = {"error": "no"}
    with pytest.raises(JudgeError, match="judge m at http"):
        HttpJudge(endpoint, "m")("hello")


def test_http_judge_times_out():
    import socket

    with socket.socket() as silent:  # accepts the connection and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(JudgeError, match=r"gave no answer in 0\.2 s; raise `timeout`"):
            HttpJudge(url, "slow", timeout=0.2)("hello")


def test_judge_scores_are_read_and_clipped():
    replies = iter(["no idea", 'Sure: {"Clarity": 9, "Accuracy": 2} done'])
    judge = LocalJudge(lambda prompt: next(replies))
    assert ask_scores(judge, "?", ("Clarity", "Accuracy", "Depth"), low=1, high=5) == {"Clarity": 5, "Accuracy": 2}
    assert quality_score({"Clarity": 5, "Accuracy": 2}, ("Clarity", "Accuracy", "Depth")) == pytest.approx(
        np.mean([1.0, 0.25, 0.5])
    )
    with pytest.raises(JudgeError, match="in 2 replies"):
        ask_scores(LocalJudge(lambda prompt: "{}"), "?", ("Clarity",), low=1, high=5, retries=2)


def test_an_unknown_metric_names_the_nearest():
    from lcjax.eval.metrics import metric

    with pytest.raises(ValueError, match="did you mean 'token_f1'"):
        metric("tokenf1")
