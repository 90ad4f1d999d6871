"""The model's fast paths by name, each with a plain twin that computes the same in the obvious way.

The fused LoRA product is the sixth: it fills the seam in projections.py, whose twin is `project_each`.
"""

from __future__ import annotations

from dataclasses import dataclass

FEW_ROWS = 0.9
"""Share of wanted tokens from which on the last layer computes all of them."""


@dataclass(frozen=True)
class Fast:
    """Which fast paths a model takes; tests and benchmarks switch each one against its plain twin (`PLAIN`)."""

    attention: str = "auto"
    """A name of kernels.KERNELS; `plain` is the twin."""
    elementwise: str = "saving"
    """RMSNorm and SwiGLU, a name of ops.ELEMENTWISE: `saving` keeps their inputs alone; `plain`; `compiled`."""
    head: bool = True
    """The loss without its logits."""
    labelled_rows: bool = True
    """The last layer's q, o and MLP only where a label needs them."""


PLAIN = Fast(attention="plain", elementwise="plain", head=False, labelled_rows=False)
