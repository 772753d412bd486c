"""Read the bodies of requests. Keys without effect are rejected unless their value is neutral."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, NamedTuple

import jinja2

from cocomix.common.errors import InputError, error_message
from cocomix.common.settings import Range, Seed, read, short_repr
from cocomix.data.tokenizer import require_unicode
from cocomix.inspection.generation import MIN_TEMPERATURE
from cocomix.inspection.notation import ALL, parse_steering
from cocomix.inspection.runs import OpenRun
from cocomix.inspection.tracing import text_ids
from cocomix.models.steering import Steering
from cocomix.serving.rows import SamplingParams

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (False, True),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Keys of OpenAI's interface that have no effect here, with the values that ask for nothing; null does, too."""
IGNORED = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"}
"""Keys that label a request and do not change the answer."""
MAX_TEXTS = 64
"""Maximum number of texts in an answer."""
MAX_STOPS, MAX_STOP = 4, 256
"""Maximum number of stop strings, and of characters in one."""
MAX_OPERATIONS = 256
"""Maximum number of operations of a steering, each of which costs time at every token."""
DEFAULT_CONCEPTS = 4
"""Number of concepts of a token that `concepts: true` shows, as `cocomix inspect` does."""
MAX_NUMBER = 10**6


@dataclass(frozen=True, kw_only=True)
class Common:
    """The keys of both kinds of requests.

    Attributes:
        model: name of the model, as in `/v1/models`.
        temperature: sampling temperature; 0 for greedy decoding.
        top_p: probability mass of the most probable tokens to sample from.
        seed: seed of sampling; by default another one for each request.
        n: number of answers to each prompt.
        stop: one string at which the text ends, or up to four.
        stream: send the answer as it is generated.
        stream_options: `include_usage`, which adds the numbers of tokens at the end of the stream.
        max_tokens: maximum number of new tokens.
        steering: changes of concepts, each as in `--steer`.
        positions: where they apply, as in `--positions`.
        after_choice: steer only concepts that are among the strongest anyway.
        concepts: show the concepts of each token: `true` for the strongest four, or their number.
    """

    model: str | None = None
    temperature: Annotated[float, Range(0, MAX_NUMBER)] = 1.0
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    seed: Seed | None = None
    n: Annotated[int, Range(1, MAX_TEXTS)] = 1
    stop: Any = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    max_tokens: Annotated[int, Range(0, MAX_NUMBER)] | None = None
    steering: Any = None
    positions: str = ALL
    after_choice: bool = False
    concepts: Any = False


@dataclass(frozen=True, kw_only=True)
class Completion(Common):
    """A request to `/v1/completions`.

    Attributes:
        prompt: a text, a list of texts, a list of token ids, or a list of such lists.
        logprobs: number of the most probable tokens to report at each place.
        echo: begin the answer with the prompt.
    """

    prompt: Any = None
    logprobs: Annotated[int, Range(0, 20)] | None = None
    echo: bool = False


@dataclass(frozen=True, kw_only=True)
class Chat(Common):
    """A request to `/v1/chat/completions`.

    Attributes:
        messages: the conversation.
        logprobs: report the log-probability of each token.
        top_logprobs: number of the most probable tokens to report with it.
        max_completion_tokens: another name of `max_tokens`.
    """

    messages: Any = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Range(0, 20)] | None = None
    max_completion_tokens: Annotated[int, Range(0, MAX_NUMBER)] | None = None


class ParsedRequest(NamedTuple):
    """A request that has been read and checked."""

    prompts: list[list[int]]
    """Token ids of each prompt."""
    params: SamplingParams
    n: int
    seed: int
    stream: bool
    include_usage: bool
    concepts: int
    """Number of concepts of each token to show; 0 for none."""


def parse(body: bytes) -> dict[str, Any]:
    """Parse a body. Raises InputError unless it is a JSON object."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise InputError("the body is not JSON") from None
    if not isinstance(given, dict):
        raise InputError("the body is not a JSON object")
    return given


def read_completion(given: Mapping[str, Any], run: OpenRun) -> ParsedRequest:
    """Read a request to `/v1/completions`. Raises InputError if it cannot be answered as it asks."""
    asked = _read(Completion, given)
    max_tokens = 16 if asked.max_tokens is None else asked.max_tokens
    return _asked(asked, run, _prompts(asked.prompt, run), max_tokens, asked.logprobs, asked.echo)


def read_chat(given: Mapping[str, Any], run: OpenRun) -> ParsedRequest:
    """Read a request to `/v1/chat/completions`. Raises InputError if it cannot be answered as it asks."""
    asked = _read(Chat, given)
    ids = _chat_ids(asked.messages, run)
    max_tokens = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    if max_tokens is None:
        max_tokens = max(1, (run.context_length or MAX_NUMBER) - len(ids))
    if asked.top_logprobs is not None and not asked.logprobs:
        raise InputError("top_logprobs has no effect without logprobs; set logprobs to true")
    return _asked(asked, run, [ids], max_tokens, (asked.top_logprobs or 0) if asked.logprobs else None, False)


def _read(kind: Any, body: Mapping[str, Any]) -> Any:
    given = {key: value for key, value in body.items() if value is not None and key not in IGNORED}
    for key in given.keys() & NEUTRAL.keys():
        if given.pop(key) not in NEUTRAL[key]:
            raise InputError(f"{key} is not supported; leave it out")
    known = {each.name for each in fields(kind)}
    # Text is checked where it is used: `read` would refuse line breaks, and copy long lists of tokens.
    free = {key: given.pop(key) for key in ("prompt", "messages", "stop") if key in given.keys() & known}
    found, problems = read(kind, given)
    if problems:
        raise InputError("; ".join(problems))
    return replace(found, **free)


def _asked(
    asked: Common, run: OpenRun, prompts: list[list[int]], max_tokens: int, logprobs: int | None, echo: bool
) -> ParsedRequest:
    if 0 < asked.temperature < MIN_TEMPERATURE:
        raise InputError(f"temperature is {asked.temperature}; expected 0 (greedy), or {MIN_TEMPERATURE} or more")
    if len(prompts) * asked.n > MAX_TEXTS:
        raise InputError(f"{len(prompts)} prompts with n {asked.n} are more than {MAX_TEXTS} texts; send fewer at once")
    if max_tokens == 0 and not echo:
        raise InputError("max_tokens is 0; expected 1 or more, or echo")
    if unknown := (asked.stream_options or {}).keys() - {"include_usage", "include_obfuscation"}:
        raise InputError(f"unknown key stream_options.{min(unknown)}; expected include_usage")
    context = run.context_length
    longest = max(map(len, prompts))
    if context is not None and longest + max_tokens > context:
        raise InputError(
            f"{longest} prompt tokens and {max_tokens} new ones (max_tokens) exceed this model's context of {context}; "
            f"ask for at most {max(0, context - longest)} new ones"
        )
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        stops=_stops(asked.stop),
        logprobs=logprobs,
        echo=echo,
        steering=_steering(asked, run),
    )
    seed = secrets.randbits(32) if asked.seed is None else asked.seed
    usage = bool((asked.stream_options or {}).get("include_usage"))
    return ParsedRequest(prompts, params, asked.n, seed, asked.stream, usage, _concepts(asked.concepts, run))


def _prompts(given: Any, run: OpenRun) -> list[list[int]]:
    one = isinstance(given, str) or (isinstance(given, list) and bool(given) and _is_id(given[0]))
    prompts = [given] if one else given
    if not isinstance(prompts, list) or not prompts or len(prompts) > MAX_TEXTS:
        raise InputError(f"prompt is {short_repr(given)}; expected a text, token ids, or a list of 1 to {MAX_TEXTS}")
    return [_ids(prompt, run) for prompt in prompts]


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(prompt: Any, run: OpenRun) -> list[int]:
    limit = run.context_length or MAX_NUMBER
    if isinstance(prompt, str):
        return text_ids(run.tokenizer, prompt, limit).tolist()
    known = run.config.get_text_config().vocab_size
    if not isinstance(prompt, list) or not all(_is_id(each) and 0 <= each < known for each in prompt):
        raise InputError(f"prompt has {short_repr(prompt)}; expected a text, or token ids from 0 to {known - 1:,}")
    if not 0 < len(prompt) <= limit:
        raise InputError(f"the prompt has {len(prompt)} tokens; this model reads 1 to {limit}")
    return prompt


def _chat_ids(messages: Any, run: OpenRun) -> list[int]:
    """Encode a conversation by the tokenizer's chat template."""
    if not getattr(run.tokenizer, "chat_template", None):
        raise InputError(
            f"the tokenizer of {run.name} has no chat template, so it cannot answer messages; "
            "use /v1/completions, or give the tokenizer a chat_template"
        )
    if not isinstance(messages, list) or not messages or not all(isinstance(each, Mapping) for each in messages):
        raise InputError(f"messages is {short_repr(messages)}; expected a list of objects with role and content")
    try:
        text = run.tokenizer.apply_chat_template(
            [{**each, "content": _content(each)} for each in messages], add_generation_prompt=True, tokenize=False
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(f"the chat template does not take these messages: {error_message(error)}") from None
    return text_ids(run.tokenizer, str(text), run.context_length or MAX_NUMBER).tolist()


def _content(message: Mapping[str, Any]) -> str:
    """Return the text of a message, whose parts may be in a list."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    if not isinstance(message.get("role"), str) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"messages has {short_repr(dict(message))}; expected a role, and text as content")
    return "".join(map(str, texts))


def _stops(given: Any) -> tuple[str, ...]:
    stops = given if isinstance(given, list) else [] if given is None else [given]
    if len(stops) > MAX_STOPS or not all(isinstance(each, str) and 0 < len(each) <= MAX_STOP for each in stops):
        raise InputError(f"stop is {short_repr(given)}; expected up to {MAX_STOPS} texts of 1 to {MAX_STOP} characters")
    for each in stops:
        require_unicode(each)
    return tuple(stops)


def _steering(asked: Common, run: OpenRun) -> Steering | None:
    given: Sequence[Any] = [asked.steering] if isinstance(asked.steering, str) else asked.steering or []
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise InputError(f'steering is {short_repr(asked.steering)}; expected a list of texts such as "123=+4"')
    if not given:
        if asked.positions != ALL or asked.after_choice:
            raise InputError("positions and after_choice have no effect without steering; give steering")
        return None
    _require_concepts("steering", run)
    steering = parse_steering(given, run.catalog, asked.positions, asked.after_choice, "steering", run.catalog_command)
    if len(steering.operations) > MAX_OPERATIONS:
        raise InputError(
            f"steering has {len(steering.operations)} operations, one for each change and span of positions; "
            f"the limit is {MAX_OPERATIONS}"
        )
    try:
        run.model.check_steering(steering)
    except ValueError as error:
        raise InputError(str(error)) from None
    return steering


def _concepts(given: Any, run: OpenRun) -> int:
    """Return the number of concepts to show."""
    if given is False:
        return 0
    _require_concepts("concepts", run)
    mixed = run.config.num_active_concepts
    number = min(DEFAULT_CONCEPTS, mixed) if given is True else given
    if not _is_id(number) or not 0 <= number <= mixed:
        raise InputError(f"concepts is {short_repr(given)}; expected true, false, or a number from 0 to {mixed}")
    return number


def _require_concepts(key: str, run: OpenRun) -> None:
    if not getattr(run.config, "mixes_concepts", False):
        raise InputError(f"{key} was given, but the model {run.name} mixes in no concepts; leave it out")
