"""Memory of one device in training, by part, in bytes: from shapes, the engine and the longest micro-batch. No torch.

Each figure follows from what the code keeps, and says from where. Weights and states: `engine.py`. Activations per
token and layer are what autograd saves in llama_ft/llama (attention.py, ops.py) and llama_ft/adapters/fused.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

from llama_ft.plan.engine import Engine
from llama_ft.plan.flops import AGAIN
from llama_ft.plan.weights import BYTES, FLOAT, HALF, Weights
from llama_ft.recipe.schema import Training

HEAD_CHUNK = {False: 64 * 2**20, True: 512 * 2**20}
"""llama_ft.llama.head.CHUNK_BYTES: float32 logits of one chunk, on a CPU and on a GPU. A test holds them equal."""
CUDA_CONTEXT = 600 * 2**20
"""A CUDA context with torch's kernels and cuBLAS workspaces, before any tensor; not yet measured by us on a GPU."""
FACTORED = ("adafactor",)
PAGED = ("paged_adamw", "paged_adamw_8bit")


@dataclass(frozen=True)
class Memory:
    """Bytes per device. `weights`: the base as held; `adapter`: factors and what is trained beside them in float32."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    overhead: int
    others: int = 0
    """Models beside the one that learns: a copy as reference, reward models."""
    sampling: int = 0
    """What drawing answers takes beyond what a training step takes in its place."""

    @property
    def total(self) -> int:
        """The peak: everything at once, in the backward pass of the longest micro-batch."""
        return sum(asdict(self).values())

    def rows(self) -> list[tuple[str, int]]:
        """(part, bytes), in the order of a table."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


@dataclass(frozen=True)
class Beside:
    """Bytes that are none of the model's that learns: of frozen models all the time, and while answers are drawn.

    first: whether all answers are drawn before there are optimizer states, and not between steps.
    """

    frozen: int = 0
    sampling: int = 0
    first: bool = False


@dataclass(frozen=True)
class Case:
    """What is trained, how, and on what. `element`: bytes of a number that products are made in."""

    weights: Weights
    training: Training
    engine: Engine
    on_gpu: bool
    element: int
    held: int
    """Bytes of a base weight that is not quantised."""
    beside: Beside = Beside()

    @classmethod
    def of(cls, weights: Weights, training: Training, dtype: str, engine: Engine, *, on_gpu: bool) -> Case:
        """On a GPU frozen weights are held and multiplied in `dtype`, trained ones held in float32 (autocast).

        DeepSpeed there holds trained ones in `dtype` too, and masters apart. On a CPU `dtype` is what the machine
        multiplies faster, or float32 where weights of the base are trained.
        """
        element = BYTES[dtype] if on_gpu or not weights.whole else FLOAT
        held = element if engine.deepspeed and on_gpu else FLOAT if weights.full else element
        return cls(weights, training, engine, on_gpu, element, held)

    @property
    def cast(self) -> bool:
        """Whether the engine holds the whole model in 16 bits: DeepSpeed on a GPU (mixed_precision: bf16)."""
        return self.engine.deepspeed and self.on_gpu and self.element == HALF

    @property
    def trained_as(self) -> int:
        """Bytes of a trained weight, and of its gradient, on the device."""
        return HALF if self.cast else FLOAT

    @property
    def autocast(self) -> bool:
        """Whether trained float32 weights of the base are multiplied in 16 bits (train/base.py: on a GPU)."""
        return bool(self.weights.whole) and self.element == HALF and not self.cast

    @property
    def fused(self) -> bool:
        """Whether the fused LoRA product computes (llama_ft/adapters/fused.py), and not PEFT's own forward."""
        adapter = self.weights.adapter
        return not self.weights.full and not self.weights.quantised and not adapter.dora and not adapter.dropout


def memory(case: Case, tokens: int, labelled: int) -> Memory:
    """Peak bytes per device with `tokens` in the longest micro-batch, `labelled` of them with loss."""
    weights, engine = case.weights, case.engine
    own = 0 if engine.offload_weights else weights.held(case.held) // engine.weight_shards
    trained = case.trained_as * weights.trained
    beside = 0 if weights.full or engine.offload_weights else trained // engine.weight_shards
    parts = Memory(
        weights=own + gathered(case),
        adapter=beside,
        gradients=0 if engine.offload_weights else trained // engine.gradient_shards,
        optimizer=optimizer(case),
        activations=activations(case, tokens),
        head=head(case, labelled),
        overhead=engine.buffers(trained) + (CUDA_CONTEXT if case.on_gpu else 0),
        others=case.beside.frozen,
    )
    in_its_place = parts.gradients + parts.activations + parts.head + (parts.optimizer if case.beside.first else 0)
    return replace(parts, sampling=max(0, case.beside.sampling - in_its_place))


def gathered(case: Case) -> int:
    """16-bit copies under autocast, and the layers that a sharding engine has whole at one time.

    Autocast casts every weight once per forward pass and autograd keeps the casts until the backward pass has used them
    (torch's autocast cache); recomputed layers cast again, one at a time. FSDP2 and ZeRO-3 gather the layer that
    computes and prefetch the next; embedding and head stay whole from the forward to the backward pass.
    """
    weights = case.weights
    if case.engine.weight_shards > 1:
        size = case.element if weights.full else case.held
        tables = weights.shape.embedding_weights
        layers = 2 * weights.held(size) * weights.largest_layer // max(1, weights.total)
        return size * tables + layers
    if not case.autocast:
        return 0
    linear = weights.shape.linear_weights if weights.full else 0  # a frozen weight is held in 16 bits already
    once = 1.0 - AGAIN[case.training.gradient_checkpointing] * (1 - 1 / weights.shape.layers)
    head = 0 if weights.reward else weights.shape.vocabulary * weights.shape.hidden
    return int(HALF * (linear * once + head))


def optimizer(case: Case) -> int:
    """States on the device. AdamW: two float32 moments (arXiv 1412.6980).

    8 bits: two bytes and two float32 scales per 256 values (arXiv 2110.02861). Adafactor: a row and a column of second
    moments per matrix (arXiv 1804.04235). Muon: one momentum per matrix of the blocks, AdamW for the rest. Paged states
    lie in main memory when the GPU is full, and so count for nothing here; a CPU pages nothing.
    """
    weights, name = case.weights, case.training.optimizer
    trained = weights.trained
    if case.engine.offload_optimizer or (case.on_gpu and name in PAGED):
        return 0
    if name.endswith("_8bit"):
        size = trained * 2 + 2 * FLOAT * trained // 256
    elif name in FACTORED:
        matrices = sum(rows * columns for rows, columns in weights.matrices)
        size = FLOAT * (sum(rows + columns for rows, columns in weights.matrices) + trained - matrices)
    elif name == "muon":
        tables = weights.shape.vocabulary
        inner = sum(rows * columns for rows, columns in weights.matrices if tables not in (rows, columns))
        size = FLOAT * inner + 2 * FLOAT * (trained - inner)
    else:
        size = 2 * FLOAT * trained
    return (size + case.engine.masters(FLOAT * trained)) // case.engine.optimizer_shards


def activations(case: Case, tokens: int) -> int:
    """What autograd keeps between the passes, and the largest gradients that live at once in a layer's backward.

    Per token and layer, in numbers: the residual stream before attention and before the MLP and both norms' outputs
    (4h); q, k, v and attention's output (2·H·d + 2·KV·d; a GPU's kernel keeps turned copies of q and k as well); gate
    and up with their product (3i). Also one reciprocal per norm and one log-sum per head in float32, and each adapter's
    low-rank input. With gradient checkpointing a layer keeps its input alone, and one layer at a time all of that.
    """
    shape = case.weights.shape
    h, queries, keys, i = shape.hidden, shape.heads * shape.dim, shape.kv_heads * shape.dim, shape.intermediate
    stream = FLOAT if case.autocast else case.element
    e = case.element
    numbers = e * (2 * h + 2 * queries + 2 * keys + 3 * i + (queries + keys if case.on_gpu else 0)) + stream * 2 * h
    numbers += FLOAT * (2 + shape.heads)
    layer = numbers + _adapter_numbers(case) / shape.layers
    backward = e * (3 * i + 2 * h) + 3 * FLOAT * h
    again = AGAIN[case.training.gradient_checkpointing]
    layers = shape.layers
    recomputed = -(-layers // 2) if again == 0.5 else layers if again else 0
    kept = (layers - recomputed) * layer + recomputed * stream * h + (layer if recomputed else 0)
    ends = stream * h + 2 * e * shape.dim  # the last norm's input; RoPE's tables
    return int(tokens * (kept + backward + ends))


def _adapter_numbers(case: Case) -> float:
    """Bytes per token that the adapters of all layers keep: low-rank inputs; in PEFT's own forward more.

    There x is cast to the factors' float32 for each projection, and the cast is kept in place of x. A dropout keeps its
    result and its mask, which is float32 on a CPU and one byte on a GPU. DoRA keeps both products that it weighs.
    """
    weights, e = case.weights, case.element
    if weights.full:
        return 0.0
    low = weights.adapter.r * len(weights.targets)
    if case.fused:
        return e * low
    per_input = FLOAT if e != FLOAT else 0
    if weights.adapter.dropout:
        per_input = FLOAT + (1 if case.on_gpu else FLOAT)
    numbers = FLOAT * low + per_input * sum(into for _, into in weights.targets)
    if per_input:
        numbers -= e * weights.shape.layers * (2 * weights.shape.hidden + weights.shape.intermediate)
    return numbers + ((e + FLOAT) * sum(out for out, _ in weights.targets) if weights.adapter.dora else 0)


def head(case: Case, labelled: int) -> int:
    """Buffers of the loss head: one chunk of logits, the gradient of the labelled rows, and that of a trained head.

    A 16-bit chunk on a GPU is worked on in float32 beside it. A trained head holds its float32 gradient, the product
    that is added to it, and, under autocast or with 16-bit weights, the cast weight.
    """
    shape = case.weights.shape
    rows = max(1, HEAD_CHUNK[case.on_gpu] // (4 * shape.vocabulary))
    chunk = min(rows, max(1, labelled)) * shape.vocabulary
    size = chunk * case.element + (chunk * FLOAT if case.on_gpu and case.element != FLOAT else 0)
    size += 2 * labelled * shape.hidden * case.element
    if case.weights.head_trained:
        size += 2 * FLOAT * shape.vocabulary * shape.hidden
    return size
