"""How an engine spreads weights, gradients and optimizer states over devices (ZeRO, arXiv 1910.02054; FSDP2)."""

from __future__ import annotations

from dataclasses import dataclass

ENGINES = ("", "DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3")
"""Names as llama_ft.recipe.launchers gives them; the empty one is a single process without an engine."""
DDP_BUCKETS = 1
"""DDP reduces gradients through buckets that stand beside them once more (gradient_as_bucket_view is off)."""


@dataclass(frozen=True)
class Engine:
    """An engine over `devices`. `offload`: states, and with ZeRO-3 and FSDP2 the weights, lie in main memory."""

    name: str
    devices: int
    offload: bool = False

    @property
    def weight_shards(self) -> int:
        """Among how many devices a weight is cut."""
        return self.devices if self.name in ("FSDP2", "FSDP", "ZeRO-3") else 1

    @property
    def gradient_shards(self) -> int:
        """Among how many devices a gradient is cut."""
        return self.devices if self.name in ("FSDP2", "FSDP", "ZeRO-2", "ZeRO-3") else 1

    @property
    def optimizer_shards(self) -> int:
        """Among how many devices an optimizer state is cut."""
        return self.devices if self.name in ("FSDP2", "FSDP", "ZeRO-1", "ZeRO-2", "ZeRO-3") else 1

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed does it, which holds a model in one type, and float32 copies of what it trains."""
        return self.name.startswith("ZeRO")

    @property
    def offload_optimizer(self) -> bool:
        """Whether the states lie in main memory."""
        return self.offload and (self.deepspeed or self.name == "FSDP2")

    @property
    def offload_weights(self) -> bool:
        """Whether weights and gradients lie in main memory as well, and weights come a layer at a time."""
        return self.offload and self.name in ("ZeRO-3", "FSDP2")

    def masters(self, trained_bytes: int) -> int:
        """DeepSpeed's optimizers keep a float32 copy of what they train, beside the weights, before it is cut."""
        return trained_bytes if self.deepspeed else 0

    def buffers(self, gradient_bytes: int) -> int:
        """What the engine holds to communicate: DDP's buckets, or two reduce buckets of 5e8 bytes at most."""
        if self.devices == 1 and self.name != "ZeRO-3":
            return 0
        if self.name == "DDP":
            return DDP_BUCKETS * gradient_bytes
        return min(gradient_bytes, 2 * 500_000_000) if self.name else 0
