"""What only a GPU can run: the variable-length kernel and a LoRA step in bfloat16, against float32 there."""

from __future__ import annotations

import pytest
import torch

from llama_ft.adapters.lora import attach_lora
from llama_ft.llama.fast import PLAIN, Fast
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.recipe.schema import Adapter
from tests.llama.conftest import SHAPES

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
    loss = model(input_ids=x, labels=x, cu_seqlens=BOUNDS).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_bfloat16_fast_path_stays_near_float32():
    expected, gradient = loss_and_gradients(torch.float32, fast=PLAIN)
    for fast in (Fast(), PLAIN, Fast(attention="flex")):
        loss, found = loss_and_gradients(torch.bfloat16, fast=fast)
        assert abs(loss - expected) <= 2e-2, fast
        assert torch.nn.functional.cosine_similarity(found, gradient, dim=0) > 0.99, fast
