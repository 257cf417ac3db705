"""Write the tokenizer files of the five published families, with the tiny vocabularies of ``vocabularies.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from tests.helpers import vocabularies as v

CHATML = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PHI3_CURRENT = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI3_APRIL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}"
    "{{'<|user|>' + '\\n' + message['content'] + '<|end|>' + '\\n' + '<|assistant|>' + '\\n'}}"
    "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\\n'}}{% endif %}{% endfor %}"
)
GLM4 = (  # without the published part for tools
    "[gMASK]<sop>{% for item in messages %}{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n"
    "{{ item['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def yi(path: Path, dummy_prefix: bool, tokenizer_json: bool) -> None:
    model = v.yi(dummy_prefix)
    (path / "tokenizer.model").write_bytes(model)
    if tokenizer_json:
        (path / "tokenizer.json").write_text(v.sentencepiece_json(model, ()), encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<unk>"}
    chat = list(v.YI_SPECIAL[3:])
    named = {0: "<unk>", 1: "<|startoftext|>", 2: "<|endoftext|>", **dict(enumerate(chat, 6))}
    decoder = {i: AddedToken(t, normalized=False, special=True) for i, t in named.items()}
    write_json(path / "special_tokens_map.json", {"additional_special_tokens": chat, **special})
    write_json(
        path / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "added_tokens_decoder": _decoder(decoder),
            "additional_special_tokens": chat,
            "chat_template": CHATML,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": 4096,
            "padding_side": "right",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            **special,
        },
    )


def phi3(path: Path, current: bool) -> None:
    added = v.phi3_added()
    ids = {t.content: v.PHI3_BASE + i for i, t in enumerate(added[3:])}
    (path / "tokenizer.model").write_bytes(v.llama2())
    text = v.sentencepiece_json(v.llama2(), added, "" if current else "<s>")
    (path / "tokenizer.json").write_text(text, encoding="utf-8")
    special = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}
    write_json(path / "added_tokens.json", ids)
    write_json(path / "special_tokens_map.json", special)
    write_json(
        path / "tokenizer_config.json",
        {
            "add_bos_token": not current,
            "add_eos_token": False,
            "added_tokens_decoder": _decoder(dict(zip((0, 1, 2, *ids.values()), added, strict=True))),
            "chat_template": PHI3_CURRENT if current else PHI3_APRIL,
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": 4096,
            "padding_side": "left",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            "use_default_system_prompt": False,
            **special,
        },
    )


def baichuan2(path: Path) -> None:
    (path / "tokenizer.model").write_bytes(v.baichuan2())
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": True}
    special = {name: {"content": token, **flags} for name, token in named.items()}
    write_json(path / "special_tokens_map.json", special)
    write_json(
        path / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "sp_model_kwargs": {},
            "tokenizer_class": "BaichuanTokenizer",
            "use_fast": False,
            **{name: {"__type": "AddedToken", **token} for name, token in special.items()},
        },
    )


def glm4(path: Path) -> None:
    (path / "tokenizer.model").write_bytes(v.glm4_ranks())
    write_json(
        path / "tokenizer_config.json",
        {
            "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]},
            **_glm4(),
            "tokenizer_class": "ChatGLM4Tokenizer",
        },
    )


def glm4_hf(path: Path) -> None:
    (path / "tokenizer.json").write_text(v.glm4_json(), encoding="utf-8")
    special = {k: x for k, x in _glm4().items() if k in ("additional_special_tokens", "eos_token", "pad_token")}
    write_json(path / "special_tokens_map.json", special)
    write_json(
        path / "tokenizer_config.json",
        {
            **_glm4(),
            "model_input_names": ["input_ids", "attention_mask"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def _glm4() -> dict[str, Any]:
    return {
        "added_tokens_decoder": _decoder(dict(enumerate(v.glm4_added(), v.GLM4_RANKS))),
        "additional_special_tokens": list(v.GLM4_SPECIAL),
        "chat_template": GLM4,
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": 128000,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "remove_space": False,
    }


def deepseek(path: Path) -> None:
    (path / "tokenizer.json").write_text(v.deepseek(), encoding="utf-8")
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    named = {"bos_token": v.DEEPSEEK_BOS, "eos_token": v.DEEPSEEK_EOS, "pad_token": v.DEEPSEEK_EOS}
    write_json(
        path / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "chat_template": DEEPSEEK,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": 4096,
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizerFast",
            "unk_token": None,
            **{name: {"__type": "AddedToken", "content": token, **flags} for name, token in named.items()},
        },
    )


def _decoder(tokens: dict[int, AddedToken]) -> dict[str, dict[str, Any]]:
    """``added_tokens_decoder`` of tokenizer_config.json."""
    keys: Sequence[str] = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {str(i): {key: getattr(token, key) for key in keys} for i, token in tokens.items()}
