"""The shipped templates to the byte, and what a bad template is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_ft.data.render import Renderer, TemplateRefusal
from llama_ft.data.template import Template, shipped_templates
from llama_ft.errors import UserError
from llama_ft.tokenizer.load import load_tokenizer

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def user(content: str, **more: str) -> Any:
    return {"role": "user", "content": content, **more}


def assistant(content: str) -> Any:
    return {"role": "assistant", "content": content}


def system(content: str) -> Any:
    return {"role": "system", "content": content}


@pytest.fixture
def alpaca(mini_tokenizer: PreTrainedTokenizerFast) -> Renderer:
    return Renderer(Template.load("alpaca"), mini_tokenizer)


@pytest.fixture
def chatml(mini_tokenizer: PreTrainedTokenizerFast) -> Renderer:
    return Renderer(Template.load("chatml"), mini_tokenizer)


def test_what_is_shipped() -> None:
    assert shipped_templates() == ["alpaca", "chatml"]


@pytest.mark.parametrize("text", ["Say hi", " spaces kept \n", "{{ braces }} {% stay %}", "ünïcode 🦙"])
def test_alpaca_bytes(alpaca: Renderer, text: str) -> None:
    plain = alpaca.render([user(text), assistant(text)])
    prompt = WITHOUT_INPUT.format(instruction=text)
    assert plain.text == prompt + text + "<|im_end|>"
    assert plain.spans == [(len(prompt), len(plain.text))]
    assert alpaca.render([user(text)], add_generation_prompt=True).text == prompt
    rich = alpaca.render([user("Do", input=text), assistant("ok")])
    assert rich.text == WITH_INPUT.format(instruction="Do", input=text) + "ok<|im_end|>"


def test_alpaca_on_llama2(llama2: Path) -> None:
    """BOS, and the space with which a SentencePiece LLaMA begins every text."""
    renderer = Renderer(Template.load("alpaca"), load_tokenizer(llama2))
    rendered = renderer.render([user("Hi"), assistant("Yes")])
    assert rendered.text == "<s> " + WITHOUT_INPUT.format(instruction="Hi") + "Yes</s>"
    ids = renderer.encode([rendered])[0].ids.tolist()
    assert ids[:4] == [1, 13866, 338, 385] and ids[-1] == 2  # <s> ▁Below ▁is ▁an … </s>
    assert renderer.end_token_id == 2


@pytest.mark.parametrize(
    ("conversation", "said"),
    [
        ([user("a"), assistant("b"), user("c"), assistant("d")], "takes a single question and its answer; use chatml"),
        ([system("s"), user("a"), assistant("b")], "has no place for a system prompt; use chatml"),
        ([assistant("b")], "takes one answer, after the question"),
        ([user("a"), assistant("b"), assistant("c")], "takes one answer, after the question"),
    ],
)
def test_alpaca_is_single_turn(alpaca: Renderer, conversation: Any, said: str) -> None:
    with pytest.raises(TemplateRefusal, match=said):
        alpaca.render(conversation)


def test_chatml_bytes(chatml: Renderer) -> None:
    turns = [system("S"), user("a"), assistant("b"), user("c", input="in"), assistant(" d\n")]
    rendered = chatml.render(turns)
    assert rendered.text == (
        "<|im_start|>system\nS<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc\n\nin<|im_end|>\n"
        "<|im_start|>assistant\n d\n<|im_end|>\n"
    )
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["b<|im_end|>", " d\n<|im_end|>"]
    asked = chatml.render([user("a")], add_generation_prompt=True)
    assert asked.text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n" and asked.spans == []


def test_chatml_is_smollm2s_own_format(smollm2: Path) -> None:
    """SmolLM2's own template adds a default system prompt; with one given, the two write the same text."""
    own = AutoTokenizer.from_pretrained(smollm2)
    turns = [system("Be brief."), user("a"), assistant("b"), user("c")]
    ours = Renderer(Template.load("chatml"), load_tokenizer(smollm2))
    assert ours.render(turns, add_generation_prompt=True).text == own.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )


def test_end_token_is_read_off_the_template(mini_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert Template.load("chatml").end_token_id(mini_tokenizer) == 2
    assert Template.load("alpaca").end_token_id(mini_tokenizer) == 2
    outside = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    assert Template("x", outside).end_token_id(mini_tokenizer) is None
    assert Template("x", "{{ messages[0].content }}").end_token_id(mini_tokenizer) is None
    other = "{% for m in messages %}{% generation %}{{ m.content }}<|endoftext|>{% endgeneration %}{% endfor %}"
    assert Template("x", other).end_token_id(mini_tokenizer) == 0


def test_declared_control_tokens(llama2: Path, chatml: Renderer) -> None:
    assert chatml.missing_control() == []
    assert Renderer(Template.load("chatml"), load_tokenizer(llama2)).missing_control() == [
        "<|im_start|>",
        "<|im_end|>",
    ]


def test_path_and_base(tmp_path: Path, mini_tokenizer: PreTrainedTokenizerFast, smollm2: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages[0].content }}")
    assert Template.load(str(path)).source == "{{ messages[0].content }}"
    base = Template.load("base", load_tokenizer(smollm2))
    assert "<|im_start|>" in base.source and not base.has_generation
    with pytest.raises(UserError, match="the base model has no chat template of its own"):
        Template.load("base", mini_tokenizer)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("alpcaa", "did you mean 'alpaca'?"), ("vicuna", "valid templates: alpaca, base, chatml")],
)
def test_unknown_template(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        Template.load(name)
    assert str(caught.value) == f"template: no such template '{name}' — {hint} (or give the path of a .jinja file)"


def test_broken_template(tmp_path: Path) -> None:
    path = tmp_path / "broken.jinja"
    path.write_text("line one\n{% for m in messages %}\n{{ m.content }\n")
    with pytest.raises(UserError) as caught:
        Template.load(str(path))
    assert str(caught.value).startswith(f"{path}:3: template: the template is broken Jinja: unexpected")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="the template cannot be read: it is not UTF-8"):
        Template.load(str(path))


@pytest.mark.parametrize(
    "source", ["{{ messages[9].content }}", "{{ 1 // 0 }}", "{{ messages + 'x' }}", "{{ nothing.at.all }}"]
)
def test_a_template_that_trips_is_a_refusal(source: str, mini_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TemplateRefusal):
        Renderer(Template("x", source), mini_tokenizer).render([user("a"), assistant("b")])


def test_a_template_cannot_reach_out(mini_tokenizer: PreTrainedTokenizerFast) -> None:
    """Templates of downloaded models run in a sandbox."""
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(TemplateRefusal):
        Renderer(Template("x", escape), mini_tokenizer).render([user("a")])


def test_a_template_that_would_lose_words_refuses(mini_tokenizer: PreTrainedTokenizerFast) -> None:
    source = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    renderer = Renderer(Template("mine", source), mini_tokenizer)
    with pytest.raises(TemplateRefusal, match="the template 'mine' leaves out the row's input"):
        renderer.render([user("a", input="in"), assistant("b")])
    with pytest.raises(TemplateRefusal, match="the template 'mine' leaves out the system prompt"):
        renderer.render([system("Never lie."), user("a"), assistant("b")])
