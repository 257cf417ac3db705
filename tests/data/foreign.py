"""Rows as other tools have them, and what luthier does with each: written down before it is tested.

The rows are written for this project, in the forms that the tools document. The model's template is Qwen3's, which
writes tools and thoughts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

END = "<|im_end|>"
THINK = "<think>\n\n</think>\n\n"  # Qwen3's template writes it before a reply without a thought
CALL = '<tool_call>\n{"name": "tide", "arguments": {"day": "Monday"}}\n</tool_call>'
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "tide", "description": "Times of low tide", "parameters": {"type": "object", "properties": {}}},
}  # fmt: skip
TOOLS = json.dumps([TOOL])
ARGUMENTS = json.dumps({"day": "Monday"})
Q, A = "Who keeps the lamp?", "I do."
HUMAN, GPT = {"from": "human", "value": Q}, {"from": "gpt", "value": A}
USER, REPLY = {"role": "user", "content": Q}, {"role": "assistant", "content": A}
ASK, LOW = {"role": "user", "content": "When is low tide on Monday?"}, {"role": "assistant", "content": "At six."}
PICTURE = [{"type": "image"}, {"type": "text", "text": "What is this?"}]


@dataclass(frozen=True)
class Foreign:
    """A row of another tool.

    expected: the trained texts, one per reply; a text: what the reason says for which the row is dropped, or the file
    refused.
    """

    tool: str
    what: str
    row: Any
    expected: list[str] | str


ROWS = [
    Foreign("LLaMA-Factory", "alpaca with system and history", {"instruction": Q, "input": "", "output": A, "system": "S", "history": [["Hello?", "Aye."]]}, ["Aye.", A]),
    Foreign("LLaMA-Factory", "sharegpt with tools, function_call and observation", {"conversations": [{"from": "human", "value": ASK["content"]}, {"from": "function_call", "value": json.dumps({"name": "tide", "arguments": {"day": "Monday"}})}, {"from": "observation", "value": "06:12"}, {"from": "gpt", "value": "At six."}], "tools": json.dumps([TOOL["function"]])}, [CALL, "At six."]),
    Foreign("LLaMA-Factory", "sharegpt ranking: chosen and rejected", {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "No."}}, "preferences are not trained"),
    Foreign("LLaMA-Factory", "KTO, label false", {"messages": [USER, REPLY], "label": False}, "label is false: the row is not to be trained"),
    Foreign("LLaMA-Factory", "KTO, label true", {"messages": [USER, REPLY], "label": True}, [A]),
    Foreign("LLaMA-Factory", "multimodal: images and the placeholder", {"messages": [{**USER, "content": "<image>What is this?"}, REPLY], "images": ["lamp.jpg"]}, "images is not empty, but only text is trained"),
    Foreign("TRL", "conversational language modelling", {"messages": [USER, REPLY]}, [A]),
    Foreign("TRL", "conversational prompt and completion", {"prompt": [USER, REPLY, ASK], "completion": [LOW]}, ["At six."]),
    Foreign("TRL", "prompt and completion", {"prompt": Q, "completion": A}, [A]),
    Foreign("TRL", "preference with explicit prompt", {"prompt": Q, "chosen": A, "rejected": "No."}, "preferences are not trained"),
    Foreign("TRL", "unpaired preference", {"prompt": [USER], "completion": [REPLY], "label": False}, "label is false: the row is not to be trained"),
    Foreign("TRL", "tool calling", {"messages": [ASK, {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "tide", "arguments": {"day": "Monday"}}}]}, {"role": "tool", "name": "tide", "content": "06:12"}, LOW], "tools": [TOOL]}, [CALL, "At six."]),
    Foreign("TRL", "vision: images and parts", {"images": ["lamp.png"], "messages": [{"role": "user", "content": PICTURE}, REPLY]}, "images is not empty, but only text is trained"),
    Foreign("TRL", "prompt only", {"prompt": Q}, "has no key 'completion'"),
    Foreign("TRL", "language modelling: text", {"text": "The lamp is lit."}, "has none of the keys"),
    Foreign("Axolotl", "sharegpt with weights", {"conversations": [HUMAN, {**GPT, "weight": 0}, HUMAN, {"from": "gpt", "value": "Nobody.", "weight": 1}]}, ["Nobody."]),
    Foreign("Axolotl", "chat_template with training flags", {"messages": [USER, {**REPLY, "training": False}, ASK, {**LOW, "training": True}]}, ["At six."]),
    Foreign("Axolotl", "chat_template with train_detail", {"messages": [USER, {**REPLY, "train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}]}, "train_detail is not empty, but a reply is trained as a whole"),
    Foreign("Axolotl", "input_output segments", {"segments": [{"label": False, "text": "Question"}, {"label": True, "text": "Answer"}]}, "has none of the keys"),
    Foreign("Axolotl", "alpaca with input", {"instruction": "Translate.", "input": "lamp", "output": "灯"}, ["灯"]),
    Foreign("ms-swift", "messages with loss false", {"messages": [USER, {**REPLY, "loss": False}, ASK, {**LOW, "loss": True}]}, ["At six."]),
    Foreign("ms-swift", "agent: tool_call and tool_response", {"tools": TOOLS, "messages": [ASK, {"role": "tool_call", "content": json.dumps({"name": "tide", "arguments": {"day": "Monday"}})}, {"role": "tool_response", "content": "06:12"}, LOW]}, [CALL, "At six."]),
    Foreign("ms-swift", "query, response, history and system", {"system": "S", "query": Q, "response": A, "history": [["Hello?", "Aye."]]}, ["Aye.", A]),
    Foreign("ms-swift", "preference: rejected_response", {"messages": [USER, REPLY], "rejected_response": "No."}, "preferences are not trained"),
    Foreign("ms-swift", "multimodal: images", {"messages": [{**USER, "content": "<image>What is this?"}, REPLY], "images": ["lamp.jpg"]}, "images is not empty, but only text is trained"),
    Foreign("OpenAI fine-tuning", "chat with weights", {"messages": [USER, {**REPLY, "weight": 0}, ASK, {**LOW, "weight": 1}]}, ["At six."]),
    Foreign("OpenAI fine-tuning", "tool calls, arguments as text", {"messages": [ASK, {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "tide", "arguments": ARGUMENTS}}]}, {"role": "tool", "tool_call_id": "call_1", "content": "06:12"}, LOW], "parallel_tool_calls": False, "tools": [TOOL]}, [CALL, "At six."]),
    Foreign("OpenAI fine-tuning", "functions and function_call", {"messages": [ASK, {"role": "assistant", "function_call": {"name": "tide", "arguments": ARGUMENTS}}, {"role": "function", "name": "tide", "content": "06:12"}, LOW], "functions": [TOOL["function"]]}, [CALL, "At six."]),
    Foreign("OpenAI fine-tuning", "preference", {"input": {"messages": [USER]}, "preferred_output": [REPLY], "non_preferred_output": [REPLY]}, "preferences are not trained"),
    Foreign("OpenAI fine-tuning", "reinforcement: a reference answer", {"messages": [USER], "reference_answer": A}, "has no assistant reply"),
    Foreign("OpenAI fine-tuning", "vision: image_url", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, REPLY]}, "is a part of type 'image_url', but only text is trained"),
    Foreign("ShareGPT", "with id and model", {"id": "x1", "model": "m", "conversations": [HUMAN, GPT]}, [A]),
    Foreign("ShareGPT", "begins with the assistant", {"conversations": [{"from": "gpt", "value": "Welcome."}, HUMAN, GPT]}, [A]),
    Foreign("ShareGPT", "role and content", {"conversations": [USER, REPLY]}, [A]),
    Foreign("ShareGPT", "ends with the user", {"conversations": [HUMAN, GPT, HUMAN]}, [A]),
    Foreign("ShareGPT", "thoughts in the text", {"conversations": [HUMAN, {"from": "gpt", "value": f"<think>\nThe keeper.\n</think>\n\n{A}"}]}, [f"<think>\nThe keeper.\n</think>\n\n{A}"]),
    Foreign("Hermes function calling", "tools in the system prompt and in a column", {"conversations": [{"from": "system", "value": f"You may call <tools>{TOOLS}</tools>"}, {"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": CALL}, {"from": "tool", "value": "<tool_response>\n06:12\n</tool_response>"}, {"from": "gpt", "value": "At six."}], "tools": TOOLS, "category": "tides"}, [CALL, "At six."]),
    Foreign("Reasoning data", "reasoning_content", {"messages": [USER, {**REPLY, "reasoning_content": "The keeper."}]}, [f"<think>\nThe keeper.\n</think>\n\n{A}"]),
    Foreign("Dolly", "instruction, context and response", {"instruction": "Who keeps it?", "context": "Marlow keeps the lamp.", "response": "Marlow.", "category": "closed_qa"}, ["Marlow."]),
    Foreign("UltraChat", "a list of texts", {"id": "0", "data": [Q, A]}, "has none of the keys"),
]  # fmt: skip


def outcome(foreign: Foreign) -> str:
    """Describe the expected outcome, as a cell of a table."""
    if isinstance(foreign.expected, list):
        count = len(foreign.expected)
        return "its reply is trained" if count == 1 else f"{count} replies are trained"
    return f"not trained: {foreign.expected}"
