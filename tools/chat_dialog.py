"""A dialog of tools.chat: what was said, how to go on with it, and files of it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from prompt_files import read_dialogs
from tokenizing import check_dialog
from tools.chat_backends import AnswerError, Backend, ContextFull, Figures, Message, Settings, one_line


class Chat:
    """A dialog, how to go on with it, and who answers; `notice` hears what the user should know."""

    def __init__(
        self,
        backend: Backend,
        settings: Settings | None = None,
        system: str | None = None,
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.backend, self.settings, self.system, self.notice = backend, settings or Settings(), system, notice
        self.history: list[Message] = []  # questions and answers in turn
        self.unanswered: str | None = None  # the last question, if it failed
        self.figures = Figures()
        self._size: int | None = None  # the history's tokens, as far as the last answer told

    @property
    def dialog(self) -> list[Message]:
        """The system prompt and the history."""
        return self._with_system(self.history)

    def ask(self, question: str) -> Iterator[str]:
        """The answer as it comes: stopped by the user its beginning is kept, after an error not even the question."""
        self.unanswered, self._size = question, None
        asked = {"role": "user", "content": question}
        pieces: list[str] = []
        complete = False
        started = time.perf_counter()
        try:
            with closing(self._answer(asked)) as texts:
                for text in filter(None, texts):
                    self.figures.first_s = self.figures.first_s or time.perf_counter() - started
                    pieces.append(text)
                    yield text
            complete = True
        except Exception:
            pieces.clear()
            raise
        finally:
            figures = self.figures
            figures.total_s = time.perf_counter() - started
            if complete or pieces:
                self.history += [asked, {"role": "assistant", "content": "".join(pieces)}]
                self.unanswered = None
                if figures.prompt_tokens is not None:
                    self._size = figures.prompt_tokens + figures.generated_tokens

    def retry(self) -> Iterator[str]:
        """Ask the last question again; what was answered before is back if nothing comes."""
        if self.unanswered is not None:
            yield from self.ask(self.unanswered)
            return
        if not self.history:
            raise AnswerError("there is no question yet")
        before = self.history[-2:]
        del self.history[-2:]
        try:
            yield from self.ask(before[0]["content"])
        finally:
            if self.unanswered is not None:
                self.history += before
                self.unanswered = None

    def undo(self) -> str | None:
        """Drop the last exchange; its question, or None where there was none."""
        if self.unanswered is not None or not self.history:
            dropped, self.unanswered = self.unanswered, None
            return dropped
        dropped, self._size = self.history[-2]["content"], None
        del self.history[-2:]
        return dropped

    def reset(self) -> None:
        """Start over, with the same system prompt and settings."""
        self.history, self.unanswered, self._size = [], None, None

    def size(self) -> int | None:
        """The tokens of the dialog, if they are known."""
        if self._size is None and self.dialog:
            self._size = self.backend.count([*self.dialog, {"role": "user", "content": ""}])
        return self._size if self.dialog else 0

    def save(self, path: str) -> None:
        """Write the dialog; only another dialog is overwritten."""
        if not self.history:
            raise AnswerError("there is nothing to save yet")
        target = Path(os.path.realpath(os.path.expanduser(path)))
        if os.path.exists(target):
            try:
                _read_dialog(target)
            except AnswerError:
                raise AnswerError(f"{target}: exists and holds no dialog; choose another name") from None
        partial = target.with_name(f".{target.name}.{os.getpid()}")  # a full disk must not cost the earlier one
        try:
            partial.write_text(json.dumps(self.dialog, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            if target.exists():
                shutil.copymode(target, partial)
            partial.replace(target)
        except OSError as error:
            raise AnswerError(f"{target}: cannot be written: {error.strerror}") from None
        finally:
            with suppress(OSError):  # most often since it was put in place
                partial.unlink()

    def load(self, path: str) -> None:
        """Go on with the dialog of a file; a question at its end waits for `retry`."""
        dialog = _read_dialog(Path(os.path.expanduser(path)))
        self.reset()
        self.system = dialog.pop(0)["content"] if dialog[0]["role"] == "system" else None
        if dialog[-1]["role"] == "user":
            self.unanswered = dialog.pop()["content"]
        self.history = dialog

    def _answer(self, asked: Message) -> Iterator[str]:
        """Answer, without the oldest exchanges where the context is too small for all."""
        history = list(self.history)
        while True:
            self._make_room(history, asked)
            self.figures = Figures()
            dialog = self._with_system([*history, asked])
            try:
                with closing(self.backend.answer(dialog, self.settings, self.figures)) as texts:
                    for text in texts:
                        if text:
                            self._forget_down_to(history)
                        yield text
                self._forget_down_to(history)
                return
            except ContextFull as error:
                if not history:  # what was dropped in vain is not forgotten
                    raise AnswerError(f"{error}; shorten the message, or the system prompt") from None
                del history[:2]

    def _make_room(self, history: list[Message], asked: Message) -> None:
        """Drop the oldest exchanges until an answer has room, as far as the backend can count."""
        context = self.backend.context
        if context is None:
            return
        room = min(self.settings.max_tokens or context, context // 4)
        while history and (self.backend.count(self._with_system([*history, asked])) or 0) + room > context:
            del history[:2]

    def _forget_down_to(self, history: list[Message]) -> None:
        dropped = (len(self.history) - len(history)) // 2
        if dropped:
            self.history = list(history)
            what = "exchange was" if dropped == 1 else f"{dropped} exchanges were"
            self.notice(f"the context is full: the oldest {what} dropped")

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *messages]


def _read_dialog(path: Path) -> list[Message]:
    """The one dialog of a file, whether it ends with a question or an answer."""
    try:
        dialogs = [body["dialog"] for body in read_dialogs(os.path.abspath(path))]  # in full, as it takes '-' for stdin
        if len(dialogs) != 1:
            raise AnswerError(f"{path}: holds {len(dialogs)} dialogs; a chat goes on with one")
        answered = dialogs[0] and isinstance(dialogs[0][-1], dict) and dialogs[0][-1].get("role") == "assistant"
        check_dialog(dialogs[0] + ([{"role": "user", "content": ""}] if answered else []))
    except (ValueError, RecursionError) as error:  # of which all errors in files and dialogs are
        raise AnswerError(one_line(str(error))) from None
    return [{"role": message["role"], "content": message["content"]} for message in dialogs[0]]
