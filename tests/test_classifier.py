"""`Classifier`: the answers of a whole evaluation, in order, from as little memory as one window takes."""

import gc
import json
import math
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from imdb_classifier import Classifier, Prediction
from imdb_classifier.checkpoints.run_folder import resolve
from imdb_classifier.checkpoints.weights import load_classifier
from imdb_classifier.data.batches import WINDOW_IN_BATCHES, TokenizedReviews
from imdb_classifier.data.tokenization import encode
from imdb_classifier.messages import NonFiniteError, UserError
from imdb_classifier.training import classifier as classifier_module
from imdb_classifier.training import inference
from imdb_classifier.training.launcher import make_accelerator
from tiny_reviews import make_rows
from tiny_runs import run_python

TEXTS = [text for text, _ in make_rows(90, seed=11)]


@pytest.fixture(scope="module")
def classifier(finished_run: Path) -> Classifier:
    return Classifier.load(finished_run, device="cpu")


@pytest.fixture(scope="module")
def whole(finished_run: Path) -> list[float]:
    """The logits of `TEXTS` from one evaluation of them all."""
    model, tokenizer = load_classifier(resolve(finished_run))
    ids = encode(tokenizer, TEXTS, model.config.max_length)
    data, accelerator = TokenizedReviews.from_lists(ids, [0] * len(ids)), make_accelerator("fp32", cpu=True)
    logits: list[float] = inference.evaluate(
        accelerator.prepare(model), data, accelerator, batch_size=64
    ).z.tolist()
    return logits


@pytest.mark.parametrize(("batch_size", "window"), [(64, 32), (4, 1), (7, 3), (1, 1), (89, 1), (90, 1)])
def test_the_answers_are_those_of_one_evaluation_in_order_for_any_window(
    batch_size: int, window: int, finished_run: Path, whole: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier_module, "WINDOW_IN_BATCHES", window)
    answers = Classifier.load(finished_run, batch_size=batch_size, device="cpu")(TEXTS)
    assert [answer.logit for answer in answers] == pytest.approx(whole, abs=2e-6)


def test_a_prediction_is_a_label_its_probability_and_the_logit_of_positive(classifier: Classifier) -> None:
    answers = classifier(TEXTS)
    assert {answer.label for answer in answers} == {"NEGATIVE", "POSITIVE"}
    for answer in answers:
        assert isinstance(answer, Prediction)
        label, probability, logit = answer
        positive = 1 / (1 + math.exp(-logit))
        assert label == ("POSITIVE" if positive > 0.5 else "NEGATIVE")
        assert probability == pytest.approx(positive if label == "POSITIVE" else 1 - positive, abs=1e-6)


class Review(str):
    """A text that is counted as long as it lives."""

    alive = 0

    def __new__(cls, text: str) -> Self:
        cls.alive += 1
        return super().__new__(cls, text)

    def __del__(self) -> None:
        type(self).alive -= 1


def test_a_stream_is_read_by_windows_and_never_more_than_one_is_alive(classifier: Classifier) -> None:
    pulled = most = 0

    def reviews() -> Iterator[str]:
        nonlocal pulled, most
        for number in range(20_000):
            pulled += 1
            review = Review(f"{'good' if number % 3 else 'bad'} film {number % 7}")
            most = max(most, Review.alive)
            yield review
            del review

    def held() -> int:
        return sum(type(thing) is TokenizedReviews for thing in gc.get_objects())

    # What the errors of other tests still hold is none of this stream's.
    gc.collect()
    earlier = held()
    window = WINDOW_IN_BATCHES * classifier.batch_size
    answers = classifier.stream(reviews())
    assert pulled == 0
    for done, _ in enumerate(answers):
        assert pulled == min((done // window + 1) * window, 20_000), done
        if done % window == 0:
            assert held() <= earlier + 1
    assert done == 20_000 - 1
    assert window <= most <= window + 1
    assert Review.alive == 0


def test_no_texts_have_no_answers(classifier: Classifier) -> None:
    assert classifier([]) == []
    assert list(classifier.stream(iter([]))) == []


FAULTS = {
    "a number": (5, TypeError, r"texts\[70\] is 5, expected a string"),
    "None": (None, TypeError, r"texts\[70\] is None, expected a string"),
    "bytes": (b"good", TypeError, r"texts\[70\] is b'good', expected a string"),
    "empty": ("", ValueError, r"texts\[70\] is blank, expected a review"),
    "blank": (" \n\t", ValueError, r"texts\[70\] is blank, expected a review"),
    "NUL": ("a\0b", ValueError, r"texts\[70\]: text holds a NUL byte"),
    "half a pair": ("a\ud800", ValueError, r"texts\[70\]: text holds half a surrogate pair"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_text_that_is_no_review_is_named_by_its_place_and_what_came_before_is_answered(
    fault: str, finished_run: Path
) -> None:
    text, error, message = FAULTS[fault]
    classifier = Classifier.load(finished_run, batch_size=1, device="cpu")
    texts = [*TEXTS[:70], text, *TEXTS[71:]]
    answers = classifier.stream(texts)  # type: ignore[arg-type]
    assert len([next(answers) for _ in range(64)]) == 64
    with pytest.raises(error, match=f"^{message}"):
        next(answers)
    with pytest.raises(error, match=f"^{message}"):
        classifier(texts)  # type: ignore[arg-type]
    assert len(classifier(TEXTS[:3])) == 3


def test_a_single_string_is_refused_at_once(classifier: Classifier) -> None:
    for ask in (classifier, classifier.stream):
        with pytest.raises(
            TypeError, match=r"^texts is a single string, expected several: put it into a list$"
        ):
            ask("A fine film.")


def test_a_logit_that_is_not_finite_names_its_window(finished_run: Path) -> None:
    classifier = Classifier.load(finished_run, batch_size=1, device="cpu")
    answers = classifier.stream(TEXTS)
    assert len([next(answers) for _ in range(32)]) == 32
    with torch.no_grad():
        for parameter in classifier.model.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="^reviews 33 to 64: 32 of 32 reviews get a logit that is NaN"):
        next(answers)


def test_a_folder_of_a_run_and_one_of_a_checkpoint_both_load_again_and_again(
    finished_run: Path, classifier: Classifier
) -> None:
    expected = classifier(TEXTS)
    for path in (finished_run, finished_run / "best", str(resolve(finished_run))):
        again = Classifier.load(path, device="cpu")
        assert again(TEXTS) == expected
        assert (again.attention, again.reason) == (classifier.attention, classifier.reason)
    assert Classifier.load(finished_run, attention="eager", device="cpu").attention == "eager"


# What belongs to the caller: before and after loading, and after answers.
STATES = """
import json, os, signal, sys
from imdb_classifier import Classifier
import torch

def state():
    return {
        "environment": sorted(os.environ),
        "handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "switches": [torch.is_grad_enabled(), str(torch.get_default_dtype()), torch.get_num_threads()],
        "fp32": [torch.backends.cuda.matmul.fp32_precision, torch.backends.cuda.matmul.allow_tf32],
        "random": torch.get_rng_state().tolist(),
    }

states = [state()]
classifier = Classifier.load(sys.argv[1], device="cpu")
states.append(state())
assert len(classifier(["a good film", "a bad one"])) == 2
print(json.dumps([*states, state()]))
"""


def test_loading_and_answering_leave_what_belongs_to_the_caller(finished_run: Path) -> None:
    shown = run_python("-c", STATES, str(finished_run))
    assert (shown.returncode, shown.stderr) == (0, "")
    before, loaded, answered = json.loads(shown.stdout)
    assert answered == loaded
    # A model draws its first weights before the checkpoint's take their place.
    assert {name for name in before if loaded[name] != before[name]} <= {"random"}


def test_threads_share_a_classifier_in_turns_and_may_load_their_own(
    finished_run: Path, classifier: Classifier, whole: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[float]] = []
    inside: list[object] = []
    evaluate = inference.evaluate

    def watched(model: Any, *arguments: Any, **options: Any) -> inference.Evaluation:
        inside.append(model)
        time.sleep(0.05)
        assert inside.count(model) == 1
        try:
            return evaluate(model, *arguments, **options)
        finally:
            inside.remove(model)

    monkeypatch.setattr(inference, "evaluate", watched)

    def ask(own: bool) -> None:
        mine = Classifier.load(finished_run, batch_size=4, device="cpu") if own else classifier
        found.append([answer.logit for answer in mine(TEXTS)])

    threads = [threading.Thread(target=ask, args=(own,)) for own in (False, False, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for logits in found:
        assert logits == pytest.approx(whole, abs=2e-6)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 to 1,000,000, got 0"),
        ({"device": "xpu"}, "device must be None or 'cpu', which this process uses, got 'xpu'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_that_there_is_not_is_a_value_error(
    option: dict[str, object], message: str, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=f"^{message}$"):
        Classifier.load(finished_run, **option)  # type: ignore[arg-type]


def test_a_checkpoint_that_is_missing_or_damaged_is_not_loaded(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        Classifier.load(tmp_path / "nowhere")
    folder = Path(shutil.copytree(finished_run / "last", tmp_path / "checkpoint"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        Classifier.load(folder, device="cpu")


def test_a_callback_may_ask_the_same_classifier(classifier: Classifier) -> None:
    nested: list[Prediction] = []
    answers = list(
        classifier.stream(["good film"] * 3, lambda reviews: nested.extend(classifier(["bad film"])))
    )
    assert (len(answers), len(nested)) == (3, 1)


@pytest.mark.parametrize("size", [0, "8", 2.5, 10**15])
def test_a_batch_size_that_there_is_not_is_one_line(size: object, finished_run: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be a whole number from 1 to 1,000,000, got"):
        Classifier.load(finished_run, device="cpu", batch_size=size)  # type: ignore[arg-type]
