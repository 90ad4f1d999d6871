"""What only a GPU can run: the variable-length kernel and a LoRA step in bfloat16, against float32 there."""

from __future__ import annotations

import pytest
import torch

from llama_ft.adapters.fused import _stacked
from llama_ft.adapters.lora import attach_lora, stack_projections
from llama_ft.llama.fast import PLAIN, Fast
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.llama.sampling import sample
from llama_ft.recipe.schema import Adapter
from tests.llama.conftest import SHAPES
from tests.llama.test_shared import lay_out, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BOUNDS = [0, 40, 41, 130, 256]


def loss_and_gradients(dtype: torch.dtype, *, fast: Fast):
    torch.manual_seed(0)
    model = attach_lora(LlamaForCausalLM(SHAPES["llama-2-70b-like"]).to(dtype), Adapter(r=8)).cuda()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator("cuda").manual_seed(1))
    model.get_base_model().model.set_fast(fast)
    x = torch.randint(0, 307, (1, 256), generator=torch.Generator().manual_seed(2)).cuda()
    labels = x.clone()
    labels[0, 40:90] = -100  # the last layer answers for some of two documents only
    loss = model(input_ids=x, labels=labels, cu_seqlens=BOUNDS).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


PATHS = {
    "auto": Fast(),
    "plain": PLAIN,
    "flex": Fast(attention="flex"),
    "flash": Fast(attention="flash"),
    "compiled": Fast(elementwise="compiled"),
}


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_paths_stay_near_float32(path):
    if path == "flash":
        pytest.importorskip("flash_attn")
    expected, gradient = loss_and_gradients(torch.float32, fast=PLAIN)
    loss, found = loss_and_gradients(torch.bfloat16, fast=PATHS[path])
    assert abs(loss - expected) <= 2e-2
    assert torch.nn.functional.cosine_similarity(found, gradient, dim=0) > 0.99


@pytest.mark.parametrize("path", PATHS)
def test_shared_prompts_in_bfloat16_stay_near_float32(path):
    if path == "flash":
        pytest.importorskip("flash_attn")
    found = {}
    for name, dtype, fast in (("exact", torch.float32, PLAIN), ("fast", torch.bfloat16, PATHS[path])):
        torch.manual_seed(0)
        model = LlamaForCausalLM(SHAPES["llama-2-70b-like"]).to(dtype).cuda()
        model.model.set_fast(fast)
        inputs = {name: tensor.cuda() for name, tensor in lay_out().inputs.items()}
        log_probs = model(**inputs).log_probs
        (log_probs * weights(len(log_probs)).cuda()).sum().backward()
        found[name] = log_probs.detach(), torch.cat([p.grad.float().flatten() for p in model.parameters()])
    assert (found["fast"][0] - found["exact"][0]).abs().max() <= 5e-2
    assert torch.nn.functional.cosine_similarity(found["fast"][1], found["exact"][1], dim=0) > 0.99


@torch.no_grad()
def test_answers_of_the_device_are_the_cpus():
    """In float32, drawn by the same seeds; answers leave on the way."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPES["llama-2-70b-like"])
    asked = {"answers": 4, "max_new_tokens": 50, "temperature": 1.0, "top_p": 0.9, "seeds": list(range(12))}
    prompts, stop = [[1, 2, 3], [4], list(range(5, 40))], frozenset(range(0, 307, 10))
    expected = sample(model, prompts, stop=stop, **asked)
    assert sample(model.cuda(), prompts, stop=stop, **asked) == expected


def test_weights_that_moved_to_the_device_are_stacked_again():
    """Attached on the CPU, moved, stacked again: no product copies its weights."""
    model = attach_lora(LlamaForCausalLM(SHAPES["llama-2-70b-like"]).bfloat16(), Adapter(r=8)).cuda()
    base = model.get_base_model()
    stack_projections(base)
    mlp = base.model.layers[0].mlp
    weights = [linear.get_base_layer().weight for linear in (mlp.gate_proj, mlp.up_proj)]
    assert _stacked(weights).data_ptr() == weights[0].data_ptr()
