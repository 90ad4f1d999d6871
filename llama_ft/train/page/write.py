"""report.html of a run, complete in itself."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from llama_ft.data.page.shell import whole_page
from llama_ft.data.page.tokens import plural, safe
from llama_ft.errors import UserError
from llama_ft.export.card_objective import settings as objective_settings
from llama_ft.files import write_text
from llama_ft.recipe.objectives import POLICY, READS
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe
from llama_ft.train.page import alignment, sampled, sections
from llama_ft.train.page.gather import ReportView, gather
from llama_ft.train.page.html import facts, number
from llama_ft.train.page.mixture import mixture

HERE = Path(__file__).parent

STATES = {"finished": "finished", "stopped": "stopped", "failed": "failed", "running": "under way"}


def write_page(run: Run) -> Path:
    """Writes report.html of a run folder, from whatever lies there. UserError if it cannot be written."""
    target = run.path / "report.html"
    try:
        write_text(target, page(gather(run)))
    except OSError as error:
        raise UserError(f"the report cannot be written: {error.strerror or error}", where=str(target)) from error
    return target


def report_run(path: Path) -> None:
    """`llama-ft report RUN`: writes the page and says where it is. UserError for a folder that is no run."""
    print(write_page(Run.open(path)))


def page(view: ReportView) -> str:
    """The whole page."""
    scores = view.objective == "reward"
    asked = ("scores", "Scores", sampled.scores(view)) if scores else ("answers", "Answers", sections.answers(view))
    parts = [
        ("curves", "Curves", sections.curves(view)),
        ("mixture", "Mixture", mixture(view)),
        ("accuracy", "Accuracy", sampled.accuracy(view)),
        ("best", "Best of K", sampled.best_of_k(view)),
        ("drawn", "Drawn answers", sampled.drawn(view)),
        asked,
        ("data", "Data", sections.data(view)),
        ("plan", "Plan", sections.plan(view)),
        ("proof", "Proof", sections.proof(view)),
        ("environment", "Environment", sections.environment(view)),
        ("recipe", "Recipe", sections.recipe(view)),
    ]
    name = safe(view.name)
    return whole_page(
        HERE,
        title=f"{name}: report of a run",
        header=f"""<a class="skip" href="#content">Skip to the content</a>
<header class="page"><p class="kind">llama-ft report · {_when(view)}</p><h1>{name}</h1>
<p class="lede">{alignment.lede(view)}</p>{_settings(view)}{sections.numbers(view)}</header>""",
        notes=_state(view) + _warnings(view),
        sections=parts,
    )


def _when(view: ReportView) -> str:
    state = STATES.get(str(view.status.get("state")), "")
    stamp = view.status.get("ended") if state != "under way" else None
    try:
        moment = datetime.fromisoformat(stamp) if stamp else datetime.now(UTC)
    except (TypeError, ValueError):
        moment = datetime.now(UTC)
    date = f"{moment:%d %B %Y, %H:%M} UTC".lstrip("0")
    return f"{state} {date}" if stamp and state else f"{state + ', ' if state else ''}written {date}"


def _settings(view: ReportView) -> str:
    recipe, lock = view.recipe, view.lock
    if recipe is None:
        return ""
    adapter, training = recipe.adapter, recipe.training
    method = "full" if adapter.method == "full" else f"{adapter.method}, r {adapter.r}, alpha {number(adapter.alpha)}"
    cut = [lock.get(key) for key in ("micro_batch", "accumulation", "world_size")]
    pairs = [
        ("method", safe(method)),
        ("objective", safe(objective_settings(recipe) if training.objective in READS else training.objective)),
        ("template", safe(recipe.template)),
        ("max_length", f"{recipe.sequence.max_length:,}"),
        ("global batch", safe(_batch(recipe, cut))),
        ("learning rate", f"{number(training.learning_rate)}, {safe(training.schedule)}"),
        ("optimizer", safe(training.optimizer)),
    ]
    return facts(pairs, "settings")


def _batch(recipe: Recipe, cut: list[object]) -> str:
    """A step's size and how it is cut; of sampled answers a micro-batch counts prompts."""
    objective, size = recipe.training.objective, recipe.training.global_batch
    items = {**alignment.DOCUMENTS, **dict.fromkeys(POLICY, "answer"), "rejection_sampling": "best answer"}
    name = f" {items[objective]}s" if objective in items else ""
    parts = [recipe.sampling.answers, *cut] if objective in POLICY else cut
    return f"{size}{name}" + (f" = {' × '.join(map(str, parts))}" if all(cut) else "")


def _state(view: ReportView) -> str:
    """What a reader must know first, of a run that did not finish, and of files that are damaged."""
    state = view.status.get("state")
    said = []
    kept = f"Checkpoint step-{view.checkpoints[-1]} is whole: " if view.checkpoints else "There is no checkpoint: "
    on = kept + ("go on with --resume." if view.checkpoints else "start again with --overwrite.")
    message = view.status.get("message")
    if state == "failed":
        said.append(("The run failed", f'<p class="reason">{safe(message or "without a word")}</p><p>{on}</p>'))
    elif state == "stopped":
        said.append((f"Stopped after step {view.step:,}", f"<p>{safe(message) + ' ' if message else ''}{on}</p>"))
    elif state == "running":
        last = f" Its last line was written {view.written:%d %B %Y, %H:%M:%S} UTC." if view.written else ""
        said.append(("Under way, or killed", f"<p>Nothing says that this run has ended.{last} {on}</p>"))
    if view.proof is not None and not view.proof.get("ok"):
        said.append(("The export was refused", "<p>The merged model is not what was trained; see the proof.</p>"))
    if view.unreadable:
        said.append(("Damaged files", f"<p>These could not be read: {safe(', '.join(view.unreadable))}.</p>"))
    wrong = state == "failed" or view.unreadable or (view.proof is not None and not view.proof.get("ok"))
    body = "".join(f"<h2>{head}</h2>{text}" for head, text in said)
    return body and f'<section class="state{" wrong" if wrong else ""}" aria-label="State of the run">{body}</section>'


def _warnings(view: ReportView) -> str:
    """What the guards warned of while the run trained."""
    items = "".join(
        f"<li><b>{safe(one.get('name', ''))}</b>, step {safe(one.get('step', '?'))}: "
        f"{safe(one.get('message', ''))}</li>"
        for one in view.warnings
        if isinstance(one, dict)
    )
    head = plural(len(view.warnings), "warning")
    return items and f'<section class="state" aria-label="Warnings"><h2>{head}</h2><ul>{items}</ul></section>'
