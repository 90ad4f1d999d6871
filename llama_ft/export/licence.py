"""What a base model's licence asks of whoever hands on a model made from it, in the words of a model card.

Llama's community licences are not open source: they bind the name, the notice and the use of what is made. The terms
are told in short, with the place of the whole text; what binds is that text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """`identifier`: the hub's word for it; `name`: a person's; `url`: the text; `terms`: what it asks for."""

    identifier: str
    name: str
    url: str | None = None
    terms: tuple[str, ...] = ()


_USERS = "a product with more than 700 million monthly users at the model's release needs a licence from Meta"
_COPY = "hand on a copy of the agreement, and a notice file with its line of attribution"
_BUILT = "show “Built with {name}” where people see it, and begin the model's name with “Llama{number}”"
_POLICY = "its use must keep to Meta's acceptable use policy, which is part of the agreement"


def _llama(number: str, path: str, *terms: str) -> Licence:
    name, url = f"Llama {number} Community License", f"https://www.llama.com/{path}/license/"
    return Licence(f"llama{number}", name, url, (_COPY, *terms, _POLICY, _USERS))


_NO_TRAINING = "neither it nor its answers may improve language models other than Llama {number} and its derivatives"
_OPEN = Licence("apache-2.0", "Apache-2.0")
LICENCES: tuple[tuple[str, Licence], ...] = (
    (r"meta-llama/Llama-2-.*", _llama("2", "llama2", _NO_TRAINING.format(number=2))),
    (r"(meta-llama|codellama)/CodeLlama-.*", _llama("2", "llama2", _NO_TRAINING.format(number=2))),
    (
        r"meta-llama/Meta-Llama-3-.*",
        _llama("3", "llama3", _BUILT.format(name="Meta Llama 3", number=" 3"), _NO_TRAINING.format(number=3)),
    ),
    (r"(meta-llama/(Meta-)?|allenai/)Llama-3\.1-.*", _llama("3.1", "llama3_1", _BUILT.format(name="Llama", number=""))),
    (r"meta-llama/Llama-3\.2-.*", _llama("3.2", "llama3_2", _BUILT.format(name="Llama", number=""))),
    (r"meta-llama/Llama-3\.3-.*", _llama("3.3", "llama3_3", _BUILT.format(name="Llama", number=""))),
    (r"huggyllama/.*", Licence("other", "LLaMA's licence of 2023", None, ("it is for research alone, not for trade",))),
    (r"(HuggingFaceTB/SmolLM2|TinyLlama/|openlm-research/open_llama).*", _OPEN),
)
"""By hub id: the first pattern that the whole id matches."""


def licence_of(hub_id: str | None) -> Licence | None:
    """The licence of a base on the hub; None where it is not known here."""
    if hub_id is None:
        return None
    return next((licence for pattern, licence in LICENCES if re.fullmatch(pattern, hub_id)), None)


def terms_of(licence: Licence) -> str:
    """A card's paragraph on what the base's licence asks for; empty where it asks for nothing out of the ordinary."""
    if not licence.terms:
        return ""
    text = f"[{licence.name}]({licence.url})" if licence.url else licence.name
    asked = "\n".join(f"- {term}" for term in licence.terms)
    return (
        f"The base model is under the {text}, which is no open-source licence and binds this model too. Among other "
        f"things:\n\n{asked}\n\nThat text binds, and not this summary."
    )
