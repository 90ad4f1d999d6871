"""The page: what is on it, and what happens when something is pressed."""

from __future__ import annotations

import html
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from llama_ft.serve.conversation import Refused
from llama_ft.serve.web.shown import clean, cost_line, messages, sampling_of
from llama_ft.serve.web.speaker import Sampling, Speaker
from llama_ft.serve.web.talk import Malformed, Side, Talk, as_markdown, as_rows

MOST_SESSIONS = 64
"""Browsers that Gradio remembers the last state of; the conversation itself is in the browser."""
MOST_WAITING = 32
"""Questions in the queue; the next one is refused in words."""


@dataclass
class Asked:
    """An answer under way: whether it is to end, and whether its conversation was left for a new one."""

    stopped: bool = False
    left: bool = False


@dataclass(frozen=True)
class Settings:
    """What the controls say at first. seed None: another each time. system None: none."""

    system: str | None
    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None


class Page:
    """The chat with one model or two. `blocks` is Gradio's application."""

    def __init__(self, speakers: list[Speaker], settings: Settings, notices: list[str]):
        self.speakers, self.settings, self.notices = speakers, settings, notices
        self._answering: dict[str, Asked] = {}
        self.blocks = gr.Blocks(title=f"{self._title} · llama-ft", analytics_enabled=False, fill_width=True)
        self.blocks.state_session_capacity = MOST_SESSIONS
        with self.blocks:
            self._lay_out()
            self._wire()
        # Not open: an answer is had through the queue alone.
        self.blocks.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)

    @property
    def _title(self) -> str:
        return " and ".join(speaker.name for speaker in self.speakers)

    # What is on it

    def _lay_out(self) -> None:
        self.talk = gr.JSON(Talk.new(len(self.speakers), self.settings.system or "").as_dict(), visible=False)
        self.file = gr.JSON(visible=False)
        with gr.Row(elem_id="page"):
            with gr.Column(scale=4, elem_id="main", min_width=300):
                gr.HTML(f"<h1>Chat with {html.escape(self._title)}</h1>", elem_id="title", padding=False)
                for notice in self.notices:
                    gr.HTML(f"<p>{html.escape(notice)}</p>", elem_classes="notice", padding=False)
                with gr.Row(elem_id="sides"):
                    self.chats: list[gr.Chatbot] = []
                    self.costs: list[gr.HTML] = []
                    for speaker in self.speakers:
                        with gr.Column(min_width=260, elem_classes="side"):
                            self._lay_out_side(speaker)
                self.status = gr.HTML("Ready.", elem_id="status", padding=False)
                with gr.Row(elem_id="ask"):
                    self.box = gr.Textbox(
                        label="Question",
                        show_label=False,
                        container=False,
                        placeholder="Your question",
                        lines=1,
                        max_lines=8,
                        autofocus=True,
                        scale=5,
                        min_width=200,
                        elem_id="question",
                        html_attributes=gr.InputHTMLAttributes(enterkeyhint="send"),
                    )
                    self.send = gr.Button("Send", variant="primary", scale=0, min_width=80, elem_id="send")
                    self.stop = gr.Button(
                        "Stop", variant="stop", scale=0, min_width=80, interactive=False, elem_id="stop"
                    )
            with gr.Column(scale=1, elem_id="settings", min_width=260):
                self._lay_out_settings()

    def _lay_out_side(self, speaker: Speaker) -> None:
        self.chats.append(
            gr.Chatbot(
                label=speaker.name,
                placeholder=f"Nothing said yet. The model holds {speaker.opened.context:,} tokens.",
                buttons=[],
                feedback_options=None,
                height=None,
                render_markdown=False,
                elem_classes="chat",
                allow_file_downloads=False,
            )
        )
        self.costs.append(gr.HTML("", elem_classes="cost", padding=False))

    def _lay_out_settings(self) -> None:
        settings = self.settings
        most = min(speaker.opened.context for speaker in self.speakers)
        gr.HTML("<h2>Settings</h2>", padding=False)
        self.system = gr.Textbox(
            settings.system or "",
            label="System prompt",
            info="Another one starts a new conversation.",
            lines=2,
            max_lines=6,
        )
        self.temperature = gr.Slider(
            0, max(2.0, settings.temperature), settings.temperature, step=0.05, label="Temperature", info="0 is greedy."
        )
        self.top_p = gr.Slider(0, 1, settings.top_p, step=0.01, label="Top-p", info="Nucleus sampling.")
        self.max_tokens = gr.Number(
            min(settings.max_tokens, most), label="Longest answer, in tokens", minimum=1, maximum=most, precision=0
        )
        # A number's field cannot be empty at first.
        self.seed = gr.Textbox(
            "" if settings.seed is None else str(settings.seed),
            label="Seed",
            info="Empty: another for each question.",
            max_lines=1,
            elem_id="seed",
        )
        self.formatted = gr.Checkbox(False, label="Format Markdown", info="Off: every character as it was said.")
        self.new = gr.Button("New conversation")
        with gr.Row():
            self.save_rows = gr.Button("Save as JSON", size="sm", min_width=100)
            self.save_markdown = gr.Button("Save as Markdown", size="sm", min_width=100)

    # What happens

    def _wire(self) -> None:
        controls = [self.system, self.temperature, self.top_p, self.max_tokens, self.seed, self.formatted]
        shown = [self.talk, self.box, self.status, self.stop, *self.chats, *self.costs]
        gr.on(
            [self.box.submit, self.send.click],
            self._answer,
            [self.box, self.talk, *controls],
            shown,
            api_name="answer",
            show_progress="hidden",
            concurrency_id="model",
            concurrency_limit=1,
            trigger_mode="once",
        )
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        self.stop.click(self._stop, None, None, api_name="stop", **quick)
        self.new.click(self._start_anew, self.system, shown, api_name="new", **quick)
        self.formatted.change(
            self._format, [self.talk, self.formatted], [*self.chats, self.status], api_visibility="private", **quick
        )
        for button, write, name in ((self.save_rows, as_rows, "jsonl"), (self.save_markdown, as_markdown, "md")):
            button.click(
                self._save(write, name), self.talk, [self.file, self.status], api_name=f"save_{name}", **quick
            ).then(None, self.file, None, js=_DOWNLOAD)

    def _answer(
        self,
        question: str,
        talk: Any,
        system: str,
        temperature: float | None,
        top_p: float | None,
        max_tokens: float | None,
        seed: str | None,
        formatted: bool,
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        """Asks each model in turn, with one seed for all."""
        session = str(request.session_hash)
        asked = self._answering[session] = Asked()
        try:
            sampling = sampling_of(temperature, top_p, max_tokens, seed)
            yield from self._ask_all(question, talk, system, sampling, formatted, asked)
        except Malformed as mistake:
            yield self._over(str(mistake))
        finally:
            self._answering.pop(session, None)

    def _ask_all(
        self, question: str, kept: Any, system: str, sampling: Sampling, formatted: bool, asked: Asked
    ) -> Iterator[dict[Any, Any]]:
        question, system = clean(question).strip(), clean(system).strip()
        if not question:
            raise Malformed("Type a question first.")
        talk = Talk.read(kept, len(self.speakers))
        if talk.system != system:
            talk = Talk.new(len(self.speakers), system)
        chats = {chat: messages(formatted, side, question) for chat, side in zip(self.chats, talk.sides, strict=True)}
        waiting = dict.fromkeys(self.costs, "waits for its turn")
        answering = {speaker: f"{html.escape(speaker.name)} is answering …" for speaker in self.speakers}
        stoppable = {self.status: answering[self.speakers[0]], self.stop: gr.update(interactive=True)}
        yield {self.box: "", **stoppable, **chats, **waiting}
        failed = 0
        for speaker, side, chat, cost in zip(self.speakers, talk.sides, self.chats, self.costs, strict=True):
            before = Side(side.said)
            try:
                for answer in speaker.answer(side, system, question, sampling, lambda: asked.stopped):
                    yield {
                        self.status: answering[speaker],
                        chat: messages(formatted, before, question, answer.text),
                        cost: cost_line(answer, sampling),
                    }
            except Refused as refusal:
                failed += 1
                yield {cost: f"not asked: {html.escape(str(refusal))}", chat: messages(formatted, before)}
            except Exception as error:  # a fault while computing: in words here, in full where the page was started
                traceback.print_exc(file=sys.stderr)
                failed += 1
                words = f"the model failed: {type(error).__name__}: {error}"
                yield {cost: html.escape(words), chat: messages(formatted, before)}
        if asked.left:  # whatever came after the new conversation was shown is taken back
            yield self._over("New conversation.") | self._empty(system)
        elif failed == len(self.speakers):
            yield self._over("The question has no answer.") | {self.box: question}
        else:
            yield self._over("Stopped." if asked.stopped else "Done.") | {self.talk: talk.as_dict()}

    def _over(self, status: str) -> dict[Any, Any]:
        return {self.status: html.escape(status), self.stop: gr.update(interactive=False)}

    def _empty(self, system: str) -> dict[Any, Any]:
        cleared: dict[Any, Any] = {chat: [] for chat in self.chats} | dict.fromkeys(self.costs, "")
        return cleared | {self.talk: Talk.new(len(self.speakers), system).as_dict()}

    def _stop(self, request: gr.Request) -> None:
        """Ends the answer that this browser waits for, if there is one; what came of it stays."""
        asked = self._answering.get(str(request.session_hash))
        if asked is not None:
            asked.stopped = True

    def _start_anew(self, system: str, request: gr.Request) -> dict[Any, Any]:
        """Ends the answer too, and nothing of it stays."""
        asked = self._answering.get(str(request.session_hash))
        if asked is not None:
            asked.left = asked.stopped = True
        return {self.status: "New conversation."} | self._empty(clean(system).strip())

    def _format(self, kept: Any, formatted: bool) -> dict[Any, Any]:
        try:
            talk = Talk.read(kept, len(self.speakers))
        except Malformed as mistake:
            return {self.status: str(mistake)}
        sides = zip(self.chats, talk.sides, strict=True)
        return {chat: gr.update(value=messages(formatted, side), render_markdown=formatted) for chat, side in sides}

    def _save(self, write: Callable[[Talk, list[str]], str], ending: str) -> Callable[[Any], tuple[Any, str]]:
        names = [speaker.name for speaker in self.speakers]
        stem = re.sub(r"[^A-Za-z0-9.-]+", "-", "-".join(["chat", *names]))

        def save(kept: Any) -> tuple[Any, str]:
            """The file as {"name", "text"}, or None, and a word about it."""
            try:
                talk = Talk.read(kept, len(names))
            except Malformed as mistake:
                return None, str(mistake)
            if talk.empty:
                return None, "Nothing to save yet."
            name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}.{ending}"
            return {"name": name, "text": write(talk, names)}, f"Saved as {name}."

        return save


_DOWNLOAD = """(file) => {
    if (!file) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([file.text], {type: "text/plain"}));
    link.download = file.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""
