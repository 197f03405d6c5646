"""A model whose conversations are written by a template of the user's or the file's, not by the one built in."""

from ..engine.model import Model
from ..text import normalise, segments
from .prompt import chat_template


class TemplatedModel(Model):
    """`choice`: as --chat-template has it. An answer is read as ever: by tokens, whoever wrote the prompt."""

    def __init__(self, choice: str, *args, **options):
        super().__init__(*args, **options)
        self.template = chat_template(choice, self.gguf.metadata)

    def render(self, messages, *, system=None, thinking=False, tools=None) -> list[int]:
        """The prompt of a conversation as ids; text in it never becomes a control token. Raises `bad_template`."""
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        turns, declared = normalise.messages(messages), normalise.tools(tools)
        return segments.encode(self.template.render(turns, declared, thinking=thinking), self.tokenizer)
