"""Plain and steered texts: what the command line prints, the same numbers for both, and nothing shared by requests."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cocomix import InputError
from cocomix.app.generate_view import sampling_settings
from cocomix.app.generating import generate_both
from cocomix.app.limits import Limits
from cocomix.inspection.generation import GenerationSettings, continuations
from cocomix.inspection.sampling import continuation
from cocomix.models.steering import Steering

PROMPT = "w5 w17 w3"
GREEDY = GenerationSettings(max_new_tokens=12)
SAMPLED = GenerationSettings(max_new_tokens=12, temperature=1.5, top_p=0.9, seed=3)
STEERING = Steering.add({7: 9.0, 21: -4.0})


def last(run, settings, steering, seconds=60.0):
    *_, found = generate_both(run, PROMPT, settings, steering, seconds)
    return found


def test_greedy_texts_are_those_of_the_command_line(opened):
    run = opened()
    found = last(run, GREEDY, STEERING)
    assert [found.plain] == continuations(run, PROMPT, GREEDY, Steering())
    assert [found.steered] == continuations(run, PROMPT, GREEDY, STEERING)
    assert found.plain != found.steered
    assert found.tokens == 12
    assert found.end == "12 new tokens"


@pytest.fixture
def blanks_in_words() -> PreTrainedTokenizerFast:
    """As SentencePiece makes them: a blank belongs to the word after it, and the first of a text is not shown."""
    words = Tokenizer(models.WordLevel({f"▁w{number}": number for number in range(53)}, unk_token="▁w0"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="▁w52")


def test_the_blank_after_the_prompt_is_kept(opened, blanks_in_words):
    prompt, new = (blanks_in_words(text)["input_ids"] for text in ("w5 w17", "w3"))
    assert blanks_in_words.decode(new) == "w3"
    assert continuation(blanks_in_words, prompt, new) == " w3"
    run = opened(tokenizer=blanks_in_words)
    found = last(run, GREEDY, STEERING)
    assert found.plain.startswith(" w")
    assert found.steered.startswith(" w")
    assert [found.plain] == continuations(run, PROMPT, GREEDY, Steering())


def test_texts_grow_token_by_token(opened):
    seen = list(generate_both(opened(), PROMPT, GREEDY, STEERING, 60.0))
    assert [each.tokens for each in seen] == [*range(1, 13), 12]
    assert all(later.plain.startswith(earlier.plain) for earlier, later in itertools.pairwise(seen))


def test_both_texts_draw_the_same_numbers(opened):
    run = opened()
    found = last(run, SAMPLED, Steering())
    assert found.plain == found.steered
    steered = last(run, SAMPLED, STEERING)
    assert steered.plain == found.plain
    assert steered.steered != found.plain
    other = last(run, GenerationSettings(max_new_tokens=12, temperature=1.5, top_p=0.9, seed=4), Steering())
    assert other.plain != found.plain


def test_requests_at_once_get_what_they_get_alone(opened):
    run = opened()
    wishes = [Steering(), Steering.add({7: 9.0}), Steering.add({21: 9.0}), Steering.add({3: -9.0, 30: 9.0})]
    alone = [last(run, SAMPLED, wish) for wish in wishes]
    assert len({found.steered for found in alone}) == len(wishes)
    together, found = threading.Barrier(len(wishes)), {}

    def ask(number: int) -> None:
        together.wait()
        found[number] = last(run, SAMPLED, wishes[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(wishes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(wishes))] == alone


def test_closing_ends_the_generation(opened):
    run, passes = opened(), []
    run.model.mixer.register_forward_hook(lambda *_: passes.append(None))
    texts = generate_both(run, PROMPT, GenerationSettings(max_new_tokens=50), STEERING, 60.0)
    next(texts)
    before = threading.active_count()
    texts.close()
    assert threading.active_count() == before - 1
    done = len(passes)
    time.sleep(0.05)
    assert len(passes) == done < 50


def test_the_time_limit_ends_it(opened):
    run = opened()
    run.model.mixer.register_forward_hook(lambda *_: time.sleep(0.05))
    found = last(run, GenerationSettings(max_new_tokens=50), STEERING, seconds=0.2)
    assert 1 <= found.tokens < 20
    assert found.end == "stopped at the time limit of 0.2 seconds"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "the text has 0 tokens"), ("w1 " * 60, "at most 4 new ones"), ("w1 " * 80, "this model reads 1 to 64")],
)
def test_a_prompt_that_does_not_fit(opened, prompt, message):
    with pytest.raises(InputError, match=message):
        next(generate_both(opened(), prompt, GREEDY, STEERING, 60.0))


def test_a_mistake_in_the_worker_is_raised(opened):
    run = opened()
    run.model.mixer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(generate_both(run, PROMPT, GREEDY, STEERING, 60.0))


def test_limits(opened):
    limits = Limits().for_run(opened())
    assert limits.new_tokens == 63
    with pytest.raises(InputError, match="the limit is 20,000"):
        limits.check_characters("a" * 20_001)
    with pytest.raises(InputError, match="enter a text first"):
        limits.check_characters("")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, 0.7, 1.0, 0), "New tokens is 0; expected a whole number from 1"),
        ((1.5, 0.7, 1.0, 0), "New tokens is 1.5; expected a whole number"),
        ((None, 0.7, 1.0, 0), "New tokens is empty; give a number"),
        ((257, 0.7, 1.0, 0), "New tokens is 257; the limit is 256"),
        ((8, -1, 1.0, 0), "Temperature is -1.0; expected a number from 0"),
        ((8, 0.7, 1.5, 0), "Top p is 1.5; expected a number above 0"),
        ((8, 0, 0.5, 0), "Top p is 0.5 without sampling"),
        ((8, 0.7, 1.0, 2.5), "Seed is 2.5; expected a whole number"),
        ((8, 0.7, 1.0, -1), "Seed is -1; expected a whole number from 0"),
    ],
)
def test_fields_are_refused_by_their_names(given, message):
    with pytest.raises(InputError, match=message):
        sampling_settings(*given, Limits())


def test_whole_numbers_may_be_written_as_others(opened):
    assert sampling_settings(8.0, 1, 1, 3.0, Limits()) == GenerationSettings(8, 1.0, 1.0, 3)
