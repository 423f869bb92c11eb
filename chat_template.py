"""Chat formats that a model brings along, as Jinja templates in its tokenizer's files.

Llama 2's and 3's own are not computed from theirs: `llama2_tokenizer` and `llama3_tokenizer` write them, as Meta's code
does. These here are for models that were trained on another one.
"""

import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from reprlib import repr as short_repr

from tokenizing import Dialog, DialogError, TokenizerError, read_file, read_json

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
# What the templates of Llama 2 and 3 have, as published and as written here.
_LLAMAS_OWN = ("<<SYS>>", "<|start_header_id|>")
_PRIVATE_USE = range(0xE000, 0xF900)


def text_beside(path: str | os.PathLike[str]) -> str | None:
    """The template beside a tokenizer's file: one in a file of its own, or in tokenizer_config.json."""
    own, config = Path(path).with_name(FILE), Path(path).with_name(CONFIG)
    if own.is_file():
        try:
            return read_file(own).decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{own}: is no UTF-8 text ({error.reason})") from None
    template = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several with names
        named = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next((entry.get("template") for entry in named), None)
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{config}: chat_template is {short_repr(template)}; a text is needed")
    return template


def template_beside(path: str | os.PathLike[str]) -> "ChatTemplate | None":
    """The chat format beside a tokenizer's file; None if that is Llama's own or is not said."""
    text = text_beside(path)
    return None if text is None or any(mark in text for mark in _LLAMAS_OWN) else ChatTemplate(text)


class ChatTemplate:
    """A template that turns a dialog into a text with the names of control tokens in it."""

    def __init__(self, text: str) -> None:
        """One that is no template is found out when somebody chats; until then the model can complete texts."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: object) -> None:
            raise DialogError(f"the model's chat template refuses this dialog: {message}")

        # As Hugging Face's library reads them.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        self._failures: tuple[type[Exception], ...] = (TemplateError, TypeError, ValueError, ArithmeticError)
        self._broken, self._template = None, None
        try:
            self._template = environment.from_string(text)
        except self._failures as error:
            self._broken = str(error)

    def split(self, dialog: Dialog, control: Mapping[str, int], bos: str, eos: str) -> list[str | int]:
        """The prompt in pieces, texts and the ids of control tokens; no text of a client's becomes one of these."""
        if self._template is None:
            raise self._unusable(self._broken)
        names = "|".join(map(re.escape, sorted(control, key=len, reverse=True)))
        # A character that nobody has stands within the names that clients write, while tokens are looked for.
        written = "".join(message["content"] for message in dialog)
        apart = next(chr(code) for code in _PRIVATE_USE if chr(code) not in written)
        guarded = [
            {"role": message["role"], "content": re.sub(f"(?=(?:{names}))(.)", rf"\1{apart}", message["content"])}
            for message in dialog
        ]
        known = {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            text = self._template.render(messages=guarded, **known)
        except DialogError:
            raise
        except self._failures as error:
            raise self._unusable(str(error)) from None
        parts = re.split(f"({names})", text)
        return [control[part] if part in control else part.replace(apart, "") for part in parts if part]

    @staticmethod
    def _unusable(problem: str | None) -> TokenizerError:
        return TokenizerError(f"the model's chat template cannot be used ({str(problem)[:200]}); send a prompt instead")
