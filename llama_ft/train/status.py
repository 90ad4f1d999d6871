"""How a run stands, in status.json: under way, finished, stopped or failed; and report.html, however it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llama_ft.files import write_json
from llama_ft.recipe.run import Run
from llama_ft.train.machine import Machine
from llama_ft.train.page.gather import STATUS
from llama_ft.train.page.write import write_page
from llama_ft.train.trackers import Tracker


class Status(TrainerCallback):
    """Keeps status.json: state, steps, started, ended, message, and the machine's rate. Only the main process writes.

    state: running, finished, stopped or failed; a run that was killed stays `running`. steps: those of the whole run;
    message: what a run failed of; machine: {flops}, the FLOP/s that `fraction_of_machine` is measured against.
    """

    def __init__(self, run: Run, console: Console, machine: Machine, *, main: bool = True):
        self.run, self.console, self.machine, self.main = run, console, machine, main
        self.contents: dict[str, Any] = {"state": "running", "started": _now()}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any):
        if not self.main:
            return
        if state.global_step:  # a run that goes on began when it began
            try:
                before = json.loads((self.run.path / STATUS).read_text(encoding="utf-8"))
                self.contents["started"] = before["started"]
            except (OSError, ValueError, KeyError, TypeError):
                pass
        self.contents["steps"] = state.max_steps
        self._write()

    @contextmanager
    def kept(self, callbacks: Sequence[Any]) -> Iterator[None]:
        """Around the training and all that follows: closes the trackers among `callbacks`, then writes how it ended and
        report.html. What goes wrong with these is said and hides nothing: the run's own exception goes on."""
        if not self.main:
            yield
            return
        state, message = "failed", None
        try:
            yield
            state = "finished"
        except SystemExit:  # after Ctrl-C or SIGTERM, with a checkpoint
            state = "stopped"
            raise
        except KeyboardInterrupt:
            state, message = "stopped", "Stopped at once, without a checkpoint of the last step."
            raise
        except BaseException as error:
            message = str(error) or type(error).__name__
            raise
        finally:
            for tracker in callbacks:
                if isinstance(tracker, Tracker):
                    end = partial(tracker.end, finished=state == "finished")
                    self._try(f"{type(tracker).__name__} could not be closed", end)
            self.contents |= {"state": state, "ended": _now(), "message": message}
            self._try(f"{STATUS} could not be written", self._write)
            self._try("report.html could not be written", lambda: write_page(self.run))

    def _write(self) -> None:
        self.contents["machine"] = {"flops": round(self.machine.rate)}
        write_json(self.run.path / STATUS, self.contents)

    def _try(self, otherwise: str, do: Callable[[], Any]) -> None:
        try:
            do()
        except Exception as error:
            self.console.print(f"{otherwise}: {error}", highlight=False, markup=False, soft_wrap=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
