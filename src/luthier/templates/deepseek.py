"""Define DeepSeek-LLM's chat format: ``<BOS>User: q\\n\\nAssistant:``, then a space, the answer and ``<EOS>``.

The model writes the space. There is no system role: the model card advises against system prompts. The published jinja
template writes one without a marker before the first turn (``data.template=jinja`` does so). Source: the checkpoint's
chat_template and model card.
"""

from __future__ import annotations

from luthier.templates.turns import Turns

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

FORMS = (
    Turns(
        name="deepseek",
        opening=BOS,
        user=("User: ", "\n\n"),
        reply="Assistant:",
        reply_prefix=" ",
        stop=(EOS,),
        markers=(BOS, EOS),
    ),
)
