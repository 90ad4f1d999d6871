"""`chat`: a conversation in the terminal, streamed; or one answer, for scripts."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

from llama_ft.errors import UserError, nearest
from llama_ft.imports import for_good
from llama_ft.paths import cache_dir

COMMANDS = {
    "/reset": "start a new conversation",
    "/system": "set the system prompt (nothing after it: remove it) and start a new conversation",
    "/help": "show these commands",
    "/exit": "leave (also Ctrl-D)",
}
_PROMPT = "› "


def chat(
    source: str,
    *,
    once: str | None = None,
    system: str | None = None,
    temperature: float = 0.7,
    top_p: float = 0.95,
    max_tokens: int = 512,
    seed: int | None = None,
) -> None:
    """Talks to a run, a model folder or a base by name, until the user leaves.

    once: answer this one question and return; stdout then holds the answer alone. temperature 0 is greedy. Raises
    UserError when there is nothing to talk to, or the template takes no system prompt and one was given.
    """
    if once is not None and not once.strip():
        raise UserError("the question is empty", hint='llama-ft chat RUN --once "What is LoRA?"')
    _tolerant_streams()
    # Only now: the mistakes above should not wait for torch.
    with for_good():
        from llama_ft.serve.conversation import Dialogue, Refused
        from llama_ft.serve.generate import Generator
        from llama_ft.serve.source import open_source

    opened = open_source(source)
    for notice in opened.notices:
        _say(notice)
    if system is None and opened.system is not None:
        system = opened.system
        _say(f"system prompt, as trained: {system}")
    try:
        dialogue = Dialogue(opened.renderer, opened.context, system)
    except Refused as refused:
        raise UserError(f"no system prompt can be used: {refused}", hint="leave out --system") from refused
    generator = Generator(opened.model, opened.stop, opened.context, seed)
    talk = Talk(dialogue, generator, temperature, top_p, max_tokens)
    try:
        if once is not None:
            talk.answer(_clean(once), must=True)
        else:
            _loop(talk, source)
    except BrokenPipeError:  # whoever reads our stdout has seen enough
        sys.stdout = open("/dev/null", "w")  # noqa: PTH123, SIM115 (stays open until the end)


class Talk:
    """One user, one model: asks, streams, keeps the conversation."""

    def __init__(self, dialogue, generator, temperature: float, top_p: float, max_tokens: int):
        self.dialogue, self.generator = dialogue, generator
        self.temperature, self.top_p, self.max_tokens = temperature, top_p, max_tokens

    def answer(self, question: str, *, must: bool = False) -> None:
        """Streams the answer to stdout. `must`: a refused question is an error, and Ctrl-C ends the program."""
        from llama_ft.serve.conversation import Refused

        try:
            ids = self.dialogue.ask(question, self.max_tokens)
        except Refused as refused:
            if must:
                raise UserError(f"the question cannot be asked: {refused}") from refused
            _say(str(refused))
            return
        for notice in self.dialogue.notices:
            _say(notice)
        tokens: list[int] = []
        interrupted = False
        try:
            self._stream(ids, tokens)
        except KeyboardInterrupt:
            if must:
                raise
            interrupted = True
        print(flush=True)
        # Decoded as a whole, as a training row would hold it.
        self.dialogue.answered(self.dialogue.renderer.tokenizer.decode(tokens, skip_special_tokens=True).strip())
        if interrupted:
            _say("stopped")
        elif len(tokens) >= self.max_tokens:
            _say(f"cut at {self.max_tokens} tokens (--max-tokens allows more)")
        elif len(ids) + len(tokens) >= self.generator.context:
            _say(f"cut: the model holds {self.generator.context} tokens")

    def _stream(self, ids: list[int], tokens: list[int]) -> None:
        """Prints whole characters as they come; a token may end in the middle of one."""
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=True)
        tokenizer = self.dialogue.renderer.tokenizer
        said = ""
        for token in self.generator.stream(
            ids, max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p
        ):
            tokens.append(token)
            piece = decoder.step(tokenizer.backend_tokenizer, token) or ""
            _show(piece, first=not said.strip())
            said += piece
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        if whole.startswith(said):  # an answer cut in the middle of a character
            _show(whole[len(said) :], first=not said.strip())


def _show(piece: str, *, first: bool) -> None:
    """A piece of an answer on stdout; the space before its first word is left out."""
    print(_printable(piece.lstrip() if first else piece), end="", flush=True)


def _loop(talk: Talk, source: str) -> None:
    read = _reader()
    _say(f"talking to {source}; /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            line = _clean(read()).strip()
            word, _, rest = line.partition(" ")
            if word == "/exit":
                return
            if word.startswith("/") and word[1:].isalpha():
                _command(talk, word, rest.strip())
            elif line:
                talk.answer(line)
        except EOFError:
            return
        except KeyboardInterrupt:
            _say("Ctrl-D or /exit leaves")


def _command(talk: Talk, word: str, rest: str) -> None:
    from llama_ft.serve.conversation import Refused

    if word == "/reset":
        talk.dialogue.reset()
        _say("new conversation")
    elif word == "/system":
        try:
            talk.dialogue.set_system(rest or None)
        except Refused as refused:
            _say(str(refused))
        else:
            _say("new conversation, with that system prompt" if rest else "new conversation, without a system prompt")
    elif word == "/help":
        for name, does in COMMANDS.items():
            _say(f"{name + (' TEXT' if name == '/system' else ''):13} {does}")
    else:
        match = nearest(word, COMMANDS)
        hint = f"did you mean {match}?" if match else f"there are {', '.join(COMMANDS)}"
        _say(f"no command {word}: {hint}")


def _reader() -> Callable[[], str]:
    """Reads a line: with history and arrow keys on a terminal, plainly from a pipe."""
    if not sys.stdin.isatty():
        return _next_line
    from prompt_toolkit import PromptSession

    return PromptSession(_PROMPT, history=_history(cache_dir("chat_history"))).prompt


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _history(path: Path):
    """Questions of earlier chats; of this one alone when the file cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("ab"):
            return FileHistory(str(path))
    except OSError:
        return InMemoryHistory()


def _say(text: str) -> None:
    """Everything that is not an answer goes to stderr."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def _clean(text: str) -> str:
    """Bytes that were no UTF-8 arrive as lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _printable(text: str) -> str:
    """On a terminal, control characters of an answer are shown and not obeyed."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "�" for c in text)


def _tolerant_streams() -> None:
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
