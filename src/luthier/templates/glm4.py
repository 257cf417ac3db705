"""GLM-4: ``[gMASK]<sop><|system|>\\ns<|user|>\\nq<|assistant|>``, then the model writes ``\\na<|user|>``.

The model opens its reply with the newline and ends it by opening the next turn, so its stop is the next user's marker.
The published jinja writes no stop after the last reply. Source: the checkpoint's chat_template and finetune.py.
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
ENDING = ""  # of a conversation, in the published jinja
