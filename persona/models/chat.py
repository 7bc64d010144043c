"""An LLM's chat template: the text that it writes around a user's text, up to where the LLM answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from persona.errors import UsageError
from persona.models.plain_text import MARK, PlainText
from persona.options import PromptOptions

# Placeholders for texts while the template is explored, made of characters that people do not type.
_USER, _SYSTEM, _ANSWER = (f"{MARK}{name}{MARK}" for name in ("user", "system", "answer"))
_CALLS_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_STRINGS = re.compile(r"""'([^']*)'|"([^"]*)\"""")
# Markers of turns that are no tokens of their own, such as [/INST], <|user|> and ### Response:.
_MARKERS = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+(?: [A-Z_]+)*\]|#{2,} ?[A-Z]\w*:?")
_USE_PLAIN = "use --prompt-format plain"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A rendered chat, for `PlainText.tokens`; the request's input is `text[start:end]`."""

    text: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What the template writes around the user's text, and on which sides it strips that text."""

    before: str
    after: str
    strips_left: bool
    strips_right: bool

    def stripped(self, text: str) -> str:
        text = text.lstrip() if self.strips_left else text
        return text.rstrip() if self.strips_right else text


class ChatTemplate:
    """The chat template of a tokenizer.

    Rendering a template for every request would take longer than tokenizing it. So the template is explored once for
    each system text: what it writes before and after the user's text, and whether it strips that text.

    Args:
        pretrained: the LLM's own tokenizer, which has a template.
        plain_text: of the same tokenizer.
        options: system text, arguments and date for the template.

    Raises:
        UsageError: the template cannot be used as the options say, or users could write its turns themselves.
    """

    def __init__(self, pretrained: PreTrainedTokenizerBase, plain_text: PlainText, options: PromptOptions) -> None:
        if not plain_text.has_offsets:
            raise UsageError(f"--prompt-format chat needs a tokenizer with a tokenizer.json; {_USE_PLAIN}")
        self._pretrained = pretrained
        self._plain_text = plain_text
        self._system = options.system
        self._arguments = options.template_arguments()
        self._template = _dated(_default_template(pretrained), options.template_date)
        for name in self._arguments:
            if not re.search(rf"\b{name}\b", self._template):
                raise UsageError(f"--template-argument {name}: the LLM's chat template does not read {name!r}")
        self._frame = lru_cache(maxsize=1024)(self._explore)
        self._markers = re.compile(r"(?!)")
        self._markers = self._find_markers()
        self.end_token = self._find_end_token()
        self._check_texts_are_kept()
        if options.system:
            self.check_system()

    def check_system(self) -> None:
        """Raises UsageError when the template has no place for a system text."""
        chat = [_message("system", _SYSTEM), _message("user", _USER)]
        try:
            has_place = _SYSTEM in self._render(chat)
        except UsageError as error:
            raise UsageError(
                f"the LLM's chat template takes no system text ({error}); put it into the input"
            ) from error
        if not has_place:
            raise UsageError("the LLM's chat template leaves out the system text; put it into the input instead")

    def typed(self, text: str) -> str:
        """A text that people typed, for a turn: a marker of turns in it is broken by a space, as in `[ /INST]`."""
        return self._plain_text.typed(self._markers.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text))

    def turn(self, text: str, *, lead: str = "", system: str | None = None) -> Turn:
        """The chat of a request, up to where the LLM answers.

        Args:
            text: the request's input, from `typed`.
            lead: what stands in front of it in the user's turn, from `typed`.
            system: the request's own system text; without one, that of the options is used.
        """
        frame = self._frame(system if system and system.strip() else self._system)
        content = frame.stripped(lead + text)
        n_stripped = len(lead + text) - len((lead + text).lstrip()) if frame.strips_left else 0
        start = len(frame.before) + max(len(lead) - n_stripped, 0)
        whole = frame.before + content
        return Turn(text=whole + frame.after, start=start, end=len(whole))

    def conversation(self, turns: Sequence[tuple[str, str]]) -> str:
        """Turns of (role, text) up to where the LLM answers, for `PlainText.tokens`."""
        chat = [_message(role, self._plain_text.protected(self.typed(text))) for role, text in turns]
        return self._plain_text.written(self._render(chat))

    def _explore(self, system: str) -> _Frame:
        before, after, strips_left, strips_right = self._around(self._system_messages(system))
        written = self._plain_text.written
        return _Frame(before=written(before), after=written(after), strips_left=strips_left, strips_right=strips_right)

    def _system_messages(self, system: str) -> list[dict[str, str]]:
        return [_message("system", self._plain_text.protected(self.typed(system)))] if system.strip() else []

    def _around(self, chat: Sequence[dict[str, str]]) -> tuple[str, str, bool, bool]:
        """What the template writes before and after the user's text, and whether it strips it left and right."""
        before, found, after = self._render([*chat, _message("user", _USER)]).partition(_USER)
        padded = self._render([*chat, _message("user", f" \n{_USER}\n ")])
        for left in ("", " \n"):
            for right in ("", "\n "):
                if found and _USER not in after and padded == f"{before}{left}{_USER}{right}{after}":
                    return before, after, not left, not right
        raise UsageError(f"the LLM's chat template does not write the user's text once and as it is; {_USE_PLAIN}")

    def _render(self, chat: Sequence[dict[str, str]], *, with_prompt: bool = True) -> str:
        try:
            rendered = self._pretrained.apply_chat_template(
                list(chat),
                chat_template=self._template,
                add_generation_prompt=with_prompt,
                tokenize=False,
                **self._arguments,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UsageError(f"the LLM's chat template fails: {error}") from error
        return cast(str, rendered)

    def _find_markers(self) -> re.Pattern[str]:
        """Markers of turns that are plain text. Raises UsageError when neither these nor a control token end a turn."""
        _, after, _, _ = self._around([])
        first, *others = self._plain_text.between_control_tokens(after)
        if not _MARKERS.search(first) and (first.strip() or not others):
            raise UsageError(
                f"the LLM's chat template ends the user's turn with the words {first.strip()!r}, which a user could "
                f"write as well; {_USE_PLAIN}"
            )
        chats = [[_message("user", _USER)], [_message("user", _USER), _message("assistant", _ANSWER)]]
        chats.append([_message("system", _SYSTEM), *chats[1]])
        found: set[str] = set()
        for chat in chats:
            try:
                rendered = self._render(chat)
            except UsageError:
                continue  # not every template knows every role
            for part in self._plain_text.between_control_tokens(rendered):
                found.update(_MARKERS.findall(part))
        longest_first = sorted(found, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _find_end_token(self) -> str | None:
        """The control token that ends the assistant's turn, if there is one."""
        chat = [_message("user", _USER), _message("assistant", _ANSWER)]
        try:
            rendered = self._render(chat, with_prompt=False)
        except UsageError:
            return None
        return self._plain_text.first_control_token(rendered.rpartition(_ANSWER)[2])

    def _check_texts_are_kept(self) -> None:
        """Raises UsageError when the template changes white space, or a text that contains one of its own strings."""
        before, after, strips_left, strips_right = self._around([])
        frame = _Frame(before=before, after=after, strips_left=strips_left, strips_right=strips_right)
        strings = {(one or other).replace("\\n", "\n") for one, other in _STRINGS.findall(self._template)}
        texts = [text for one in sorted(strings) if one.strip() for text in (one, f"a {one} b")]
        for text in ["\n\na", "a\n\n", " \ta \t", "a  b\n\n\nc", *texts]:
            if self._render([_message("user", text)]) != f"{before}{frame.stripped(text)}{after}":
                raise UsageError(f"the LLM's chat template changes a user's text like {text!r}; {_USE_PLAIN}")


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _default_template(pretrained: PreTrainedTokenizerBase) -> str:
    try:
        return pretrained.get_chat_template()
    except ValueError as error:
        raise UsageError(
            f"the LLM's tokenizer has several chat templates and none is the default; {_USE_PLAIN}"
        ) from error


def _dated(template: str, day: str) -> str:
    """The template with a fixed date in place of today's. Raises UsageError when one of them is missing."""
    if "strftime_now" not in template:
        if day:
            raise UsageError(f"--template-date {day}: the LLM's chat template writes no date; leave it out")
        return template
    if not day:
        raise UsageError(
            "the LLM's chat template writes today's date, so answers would change from day to day; fix the date with "
            f"--template-date, for example {datetime.now(UTC).date()}"
        )
    dated = _CALLS_TODAY.sub(lambda found: repr(date.fromisoformat(day).strftime(found[2])), template)
    if "strftime_now(" in dated:
        raise UsageError(f"the LLM's chat template writes a date in a way that cannot be fixed; {_USE_PLAIN}")
    return dated
