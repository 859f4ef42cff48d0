"""Structured output: texts that follow a JSON schema, a regular expression or a grammar, by llguidance.

llguidance (https://github.com/guidance-ai/llguidance, MIT) is an Earley parser over lexemes; at each position it says
which tokens of the vocabulary a grammar allows, as a mask of bits. It is imported when the first grammar is asked for.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import shown
from .engine.constraint import Constraint, MaskWords, mask_words
from .errors import CuplamaError, ParameterError
from .output_form import FORMS, JSON_STYLE
from .sampling_params import SamplingParams
from .text.token_bytes import TokenBytes
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["Grammars"]

_KEPT = 16  # compiled grammars of a model
# What one grammar may cost: a hostile one is refused within a few seconds. In the order of the lines: nodes of its
# regular expressions (8,000 elements of one, or 3,000 values of an enum), symbols of its rules, states of its lexer
# (of 1 to 2 kB), and for one mask, steps of the lexer and items of the parser.
_LIMITS = {
    "initial_lexer_fuel": 50_000,
    "max_grammar_size": 100_000,
    "max_lexer_states": 25_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
}
_MAX_LINES = 500  # of a Lark or GBNF grammar; the time to refuse one grows with the square
# Bytes of stack to compile on, touched only where they are used: llguidance follows rules and references by recursion,
# and 1,000 of them in a row overflow the usual 8 MB. The longest text allowed needs less than 64 MB.
_STACK = 2**28
_stack_size = threading.Lock()  # the size is that of all threads which start meanwhile
_LONGEST_ERROR = 300  # characters of llguidance's message
# What llguidance calls by a name of its own.
_ERRORS = {"NoExtensionBias": "the vocabulary has no token that could come next"}


class Grammars:
    """Compiles what sampling parameters ask for, once for each text; each sequence has a constraint of its own.

    tokenizer: a function that gives it, or raises TokenizerError; vocab_size: of the logits; stop_ids: the model's own.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer], vocab_size: int, stop_ids: Collection[int]) -> None:
        self._tokenizer, self._vocab_size, self._stop_ids = tokenizer, vocab_size, frozenset(stop_ids)
        self._vocabulary: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._compiled = lru_cache(_KEPT)(self._compile)

    def check(self, params: SamplingParams) -> None:
        """Compile what is asked for, which may take a second. Raises what ``constraint`` raises."""
        if (asked := _asked(params)) is not None:
            self._compiled(*asked)

    def constraint(self, params: SamplingParams, stops: Collection[int]) -> Constraint | None:
        """What a sequence with these parameters may draw; None for anything. stops: the ids that end the sequence.

        Raises ParameterError for what is no schema, regex or grammar, with llguidance's own words, and if llguidance is
        missing; TokenizerError if the model has no tokenizer.
        """
        asked = _asked(params)
        if asked is None:
            return None
        matcher, words = self._compiled(*asked)
        ends = _Ends.of(self._vocab_size, params, self._stop_ids, frozenset(stops))
        # A copy shares the automaton of the lexer, which grows with what any of them has met.
        return _Constraint(asked[0], matcher.deep_copy(), words, ends, self._forget)

    def _compile(self, form: str, text: str) -> tuple[LLMatcher, int]:
        """A matcher that has consumed nothing, and knows its first mask; the words of its masks."""
        llguidance = _llguidance(form)
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary(llguidance)
        vocabulary = self._vocabulary
        limits = llguidance.LLParserLimits(**_LIMITS, verbose_errors=False)
        grammar = _grammar(llguidance, form, text)
        matcher = _on_a_large_stack(partial(llguidance.LLMatcher, vocabulary, grammar, log_level=0, limits=limits))
        if not matcher.is_error():
            matcher.compute_bitmask()  # fails where nothing can begin
        if matcher.is_error():
            raise ParameterError(f"{form} = {shown(text)}: {_said(matcher.get_error())}")
        return matcher, mask_words(vocabulary.vocab_size)

    def _read_vocabulary(self, llguidance: Any) -> LLTokenizer:
        tokenizer = self._tokenizer()
        stops = sorted(self._stop_ids)
        known = _Vocabulary(TokenBytes(tokenizer, self._vocab_size, stops), tokenizer.bos, stops[0] if stops else None)
        found: LLTokenizer = llguidance.LLTokenizer(known, eos_token=stops or None)
        return found

    def _forget(self) -> None:
        """Drop what is compiled: the states that copies of a grammar share may have come to their limit."""
        self._compiled.cache_clear()


def _asked(params: SamplingParams) -> tuple[str, str] | None:
    """The form that the parameters ask for, and its text."""
    for form in FORMS:
        value = getattr(params, form)
        if value is not None:
            return form, value if isinstance(value, str) else json.dumps(value)
    return None


class _Vocabulary:
    """What llguidance asks of a tokenizer. It calls it for text that the grammar forces."""

    is_tokenizer_wrapper = True

    def __init__(self, tokens: TokenBytes, bos: int | None, eos: int | None) -> None:
        self.tokens, self.special_token_ids = tokens.tokens, sorted(tokens.hidden)
        self.bos_token_id, self.eos_token_id = bos, eos
        self._encode = tokens.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


@dataclass(frozen=True)
class _Ends:
    """Where a sequence may end, as masks over the vocabulary.

    Stop tokens are allowed exactly where the grammar may end: all of them, those of the request too (``more``). Before
    ``least`` tokens they are not, unless the grammar allows nothing else; with ignore_eos that is everywhere.
    """

    ids: frozenset[int]  # that end the sequence
    stops: MaskWords
    more: MaskWords
    allowed: MaskWords  # all but tokens that logit_bias bans
    least: float

    @classmethod
    def of(cls, vocab_size: int, params: SamplingParams, own: frozenset[int], stops: frozenset[int]) -> _Ends:
        banned = [i for i, bias in params.logit_bias.items() if bias == -math.inf]
        allowed = _every_bit(vocab_size) & ~_bits(vocab_size, banned)
        least = math.inf if params.ignore_eos else params.min_tokens
        return cls(own | stops, _bits(vocab_size, own | stops), _bits(vocab_size, stops - own), allowed, least)


class _Constraint:
    """A Constraint of the engine: one sequence's place in a grammar. words: of the matcher's mask."""

    def __init__(self, form: str, matcher: LLMatcher, words: int, ends: _Ends, forget: Callable[[], None]) -> None:
        self._form, self._matcher, self._ends, self._forget = form, matcher, ends, forget
        self._words = np.zeros(words, np.int32)
        self._accepted = 0
        self.finished = False
        self.error: CuplamaError | None = None

    def fill_mask(self, row: MaskWords) -> None:
        matcher, ends = self._matcher, self._ends
        if self.finished:
            row.fill(-1)  # nobody reads what is drawn
            return
        matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if matcher.is_error():
            self._fail(matcher.get_error())
        np.bitwise_and(self._words[: len(row)], ends.allowed, out=row)
        if matcher.is_accepting():
            row |= ends.more & ends.allowed
        if self._accepted < ends.least and (rest := row & ~ends.stops).any():
            row[:] = rest
        if not self.finished and not row.any():
            self._fail("logit_bias bans every token that may follow")
        if self.finished:
            row.fill(-1)

    def accept(self, token: int) -> None:
        if self.finished:
            return
        self._accepted += 1
        if token in self._ends.ids:
            self.finished = True
        elif not self._matcher.consume_token(token):
            self._fail(self._matcher.get_error())
        else:
            self.finished = self._matcher.is_stopped()

    def _fail(self, message: str) -> None:
        self.error = ParameterError(f"{self._form}: after {self._accepted} tokens: {_said(message)}")
        self.finished = True
        self._forget()


def _on_a_large_stack(work: Callable[[], Any]) -> Any:
    """What ``work`` returns, on a thread of its own."""
    with _stack_size, ThreadPoolExecutor(1) as pool:
        before = threading.stack_size(_STACK)
        try:
            done = pool.submit(work)  # starts the thread
        finally:
            threading.stack_size(before)
        return done.result()


def _llguidance(form: str) -> Any:
    try:
        import llguidance
        import llguidance.gbnf_to_lark
    except ImportError as e:
        raise ParameterError(f"{form} needs llguidance ({e}): pip install 'cuplama[serve]'") from None
    return llguidance


def _grammar(llguidance: Any, form: str, text: str) -> Any:
    """What llguidance compiles. Raises ParameterError for what its converters refuse."""
    try:
        if form == "json_schema":
            return llguidance.LLMatcher.grammar_from_json_schema(text, defaults=dict(JSON_STYLE))
        if form == "regex":
            return llguidance.LLMatcher.grammar_from_regex(text)
        _check_lines(text)
        lark = llguidance.gbnf_to_lark.any_to_lark(text)
        _check_lines(lark)
        return lark
    except ParameterError:
        raise
    except Exception as e:  # the converter from GBNF raises whatever its own code runs into
        raise ParameterError(f"{form} = {shown(text)}: {_said(str(e) or type(e).__name__)}") from None


def _check_lines(grammar: str) -> None:
    lines = max(grammar.count("\n") + 1, grammar.count("::="))
    if lines > _MAX_LINES:
        raise ParameterError(f"grammar has {lines} lines; the most is {_MAX_LINES}")


def _said(message: str) -> str:
    """llguidance's message on one line, in words."""
    line = " ".join(message.replace("<non-verbose/>", "").split())
    line = _ERRORS.get(line, line)
    return line if len(line) <= _LONGEST_ERROR else line[: _LONGEST_ERROR - 3] + "..."


def _bits(vocab_size: int, ids: Collection[int]) -> MaskWords:
    """The mask [mask_words(V)] of some tokens; ids beyond the vocabulary are left out."""
    words = np.zeros(mask_words(vocab_size), np.uint32)
    known = np.array([i for i in ids if i < vocab_size], np.uint32)
    np.bitwise_or.at(words, known // 32, np.uint32(1) << known % 32)
    return words.view(np.int32)


def _every_bit(vocab_size: int) -> MaskWords:
    """The mask of all tokens, without the bits beyond the vocabulary."""
    words = np.full(mask_words(vocab_size), 2**32 - 1, np.uint32)
    if vocab_size % 32:
        words[-1] = 2 ** (vocab_size % 32) - 1
    return words.view(np.int32)
