"""Define GLM-4's chat format: ``[gMASK]<sop><|system|>\\ns<|user|>\\nq<|assistant|>\\na<|user|>``.

The model starts its reply with the newline after ``<|assistant|>``, and ends it with the marker of the next user turn,
which is its stop token. The published jinja template writes no stop token after the last reply.
Source: the checkpoint's chat_template and finetune.py.
"""

from __future__ import annotations

from luthier.templates.turns import Turns

FORMS = (
    Turns(
        name="glm4",
        opening="[gMASK]<sop>",
        system=("<|system|>\n", ""),
        user=("<|user|>\n", ""),
        reply="<|assistant|>",
        reply_prefix="\n",
        stop=("<|user|>",),
        markers=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    ),
)
ENDING = ""  # of a conversation, in the published jinja template
